"""How far weights wander when they are perturbed and restored again and again, and nothing is learned.

    python -m benchmarks.drift.run                  # 10,000 steps of each dtype and placement: minutes on one core
    python -m benchmarks.drift.run --steps 300      # a look

Each step is one of MeZO with lr = 0 and a closure whose loss is constant: perturb by +eps z, by -eps z, restore. What ought
to change is nothing. `published` is the released code's order in plain torch, w = w + eps z; w = w - 2 eps z;
w = w + eps z, with z drawn again each time from a generator with the step's seed, in the weights' dtype. Weights start as
transformers' do, normal with a standard deviation of 0.02. Stores benchmarks/results/drift-cpu.json, of which
benchmarks/pages.py draws docs/images/drift.png.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import zokern
from benchmarks import study
from benchmarks.parts import Pages, load, panels, save
from zokern.bench.record import store

DTYPES = ("float32", "float16", "bfloat16")
PLACEMENTS = ("published", "inplace", "shadow", "stream")
EPS, STD, WIDTH, BLOCKS = 1e-3, 0.02, 64, 4
COLOURS = {"float32": "#4363d8", "float16": "#f58231", "bfloat16": "#e6194b"}
CURVES = {"published": ("--", "o", "published order, plain torch"), "inplace": ("-", "s", "inplace")}


class Model(nn.Module):
    def __init__(self, parameters: int, dtype: torch.dtype) -> None:
        super().__init__()
        inner = parameters // (2 * WIDTH * BLOCKS)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, inner, bias=False), nn.Linear(inner, WIDTH, bias=False))
            for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, 1, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(STD * torch.randn(p.shape, generator=generator))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def published_step(model: nn.Module, seed: int) -> None:
    generator = torch.Generator()
    for scale in (1.0, -2.0, 1.0):
        generator.manual_seed(seed)
        for p in model.parameters():
            z = torch.normal(0.0, 1.0, p.shape, generator=generator, dtype=p.dtype)
            p.data = p.data + scale * z * EPS


def stepper(model: Model, placement: str) -> Callable[[int], object]:
    """step(number): one perturbation and its restore."""
    x = torch.ones(1, WIDTH, dtype=model.head.weight.dtype)
    if placement == "published":
        return lambda number: published_step(model, number)
    opt = zokern.MeZO(model, 0.0, eps=EPS, placement=placement)

    def closure() -> float:
        model(x)
        return 1.0

    return lambda _: opt.step(closure)


@torch.no_grad()
def changed(now: list[Tensor], before: list[Tensor]) -> float:
    """The share of elements with other bits than before."""
    view = {4: torch.int32, 2: torch.int16}[now[0].element_size()]
    count = sum(int((a.view(view) != b.view(view)).sum()) for a, b in zip(now, before, strict=True))
    return count / sum(a.numel() for a in now)


def drift(model: nn.Module, start: list[Tensor]) -> dict[str, float]:
    """The share of weights whose bits changed; the rms of the change, relative to that of the weights."""
    now = [p.detach() for p in model.parameters()]
    moved = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(now, start, strict=True))
    size = sum(float(b.double().square().sum()) for b in start)
    return {"changed": changed(now, start), "drift": (moved / size) ** 0.5}


def points(steps: int) -> set[int]:
    """The steps after which a run is looked at."""
    grid = [m * 10**e for e in range(9) for m in (1, 1.5, 2, 3, 5, 7)]
    return {*(int(n) for n in grid if n < steps), steps}


def measure(dtype: str, placement: str, parameters: int, steps: int, tick: Callable[[int], None]) -> list[Any]:
    model = Model(parameters, getattr(torch, dtype))
    start = [p.detach().clone() for p in model.parameters()]
    step, rows, at = stepper(model, placement), [], points(steps)
    with torch.no_grad():
        for number in range(1, steps + 1):
            step(number)
            if number in at:
                rows.append({"steps": number, **drift(model, start)})
                tick(number)
    return rows


def main() -> None:
    args = study.parser(__doc__, steps=(10_000, "of each run"), parameters=(50_000, "of the model, about"),
                        threads=(1, "of torch")).parse_args()  # fmt: skip
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {dtype: {} for dtype in DTYPES}
    with Progress(transient=True) as progress:
        for dtype in DTYPES:
            for placement in PLACEMENTS:
                task = progress.add_task(f"{dtype}, {placement}", total=args.steps)
                rows = measure(dtype, placement, args.parameters, args.steps,
                               lambda number, task=task: progress.update(task, completed=number))  # fmt: skip
                results[dtype][placement] = rows
                told = f"changed {rows[-1]['changed']:8.3%}   drift {rows[-1]['drift']:.3g}"
                progress.console.print(f"{dtype:9} {placement:10} {told}", highlight=False)
                progress.remove_task(task)
    count = sum(p.numel() for p in Model(args.parameters, torch.float32).parameters())
    settings = {"parameters": count, "steps": args.steps, "eps": EPS, "std": STD, "blocks": BLOCKS}
    path = store("drift", torch.device("cpu"), settings, results, args.output)
    print("stored in", path.name)


# --------------------------------------------------------------------------------------------------------- the picture


def draw() -> None:
    record = load("drift-cpu.json")
    figure, (axes,) = panels(1, 7.2, 4.4, dpi=130)
    curves, steps = record["results"], record["settings"]["steps"]
    floor = min(row["drift"] for runs in curves.values() for rows in runs.values() for row in rows if row["drift"]) / 10
    for dtype in DTYPES:
        for placement, (line, marker, label) in CURVES.items():
            rows = [row for row in curves[dtype][placement] if row["drift"]]
            axes.plot([row["steps"] for row in rows], [row["drift"] for row in rows], line, marker=marker, markersize=3.5,
                      color=COLOURS[dtype], label=f"{dtype}, {label}")  # fmt: skip
    if all(row["changed"] == 0 for dtype in DTYPES for name in ("shadow", "stream") for row in curves[dtype][name]):
        axes.axhline(floor, color="#3c8d4f", linewidth=2)
        told = "0: shadow and stream, all three dtypes: no bit changed"
        axes.text(1, floor * 1.3, told, color="#3c8d4f", fontsize=8.5)
    axes.set(xscale="log", yscale="log", xlim=(0.9, 1.15 * steps), ylim=(floor / 2, None))
    axes.set(xlabel="steps with lr = 0", ylabel="rms of the change / rms of the weights")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7.5, framealpha=0.9)
    save(figure, "drift")


PAGES: Pages = {"docs/placements.md": {}}  # a picture alone

if __name__ == "__main__":
    main()

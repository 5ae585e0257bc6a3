"""What becomes of updates that are small against the spacing of bfloat16: the demo with nearest and stochastic rounding.

    python -m benchmarks.rounding.run                                 # nine runs: 20 minutes on two cores
    python -m benchmarks.rounding.run --steps 100 --output x.json     # a look

The model, data, loss and evaluation are those of `zokern finetune` without options; the method is MeZO with momentum,

    m <- beta m + c z;    w <- round(w - lr m)

with the same batches and directions for all three ways of a seed. Momentum because it spreads each direction over some
1/(1 - beta) steps: the weights go equally far in updates that are smaller, one by one. `float32` keeps the weights in
float32 and runs the forwards under bfloat16 autocast. page.py makes the page's figures of the JSON.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

import zokern
from benchmarks import study
from benchmarks.convergence.tasks import similarity
from benchmarks.drift.run import changed
from zokern.bench.record import store
from zokern.finetune.batches import Order
from zokern.finetune.tasks import Task, evaluate

# the weights' dtype and the rounding of the update
WAYS = {"nearest": (torch.bfloat16, "nearest"), "stochastic": (torch.bfloat16, "stochastic"),
        "float32": (torch.float32, "nearest")}  # fmt: skip
EPS, BETA, BATCH, EVAL_BATCH, PLACEMENT = 1e-3, 0.99, 16, 64, "shadow"


def demo(dtype: torch.dtype) -> Task:
    """The task of `zokern finetune` without options, with its weights in `dtype`."""
    task, data = similarity(dtype)
    task.add("train", data.train)
    task.add("eval", data.eval)
    return task


@torch.no_grad()
def arrived(now: list[Tensor], before: list[Tensor], wanted: list[Tensor]) -> float:
    """<now - before, wanted> / <wanted, wanted>: how much of the wanted update the weights have made; 1 is all of it."""
    made = sum(float(((a.double() - b.double()) * u).sum()) for a, b, u in zip(now, before, wanted, strict=True))
    return made / sum(float(u.double().square().sum()) for u in wanted)


def tune(way: str, seed: int, lr: float, steps: int, every: int) -> dict[str, Any]:
    """One run: held-out loss and accuracy, and what the updates did, at every `every`-th step."""
    torch.set_num_threads(1)
    dtype, rounding = WAYS[way]
    task, begun = demo(dtype), time.perf_counter()
    order = Order(len(task.sets["train"][1]), seed)
    opt = zokern.MeZO(task.model, lr, eps=EPS, update="momentum", betas=(BETA, 0.999), seed=seed, rounding=rounding,
                      placement=PLACEMENT)  # fmt: skip
    weights = [p for p in task.model.parameters() if p.requires_grad]
    start, squares, rows = [p.detach().clone() for p in weights], 0.0, []

    def forwards() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)

    def row(step: int, **more: float) -> None:
        with forwards():
            accuracy, loss = evaluate(task, "eval", EVAL_BATCH)
        rows.append({"step": step, "loss": loss, "accuracy": accuracy, "changed": changed(weights, start), **more})

    row(0)
    for step in range(1, steps + 1):
        batch = task.batch("train", order.draw(BATCH))
        look = step % every == 0 or step == steps
        before = [p.detach().clone() for p in weights] if look else []
        with forwards():
            opt.step(lambda b=batch: task.loss(b))
        squares += float(opt.metrics["projected_gradient"]) ** 2
        if look:
            wanted = [-lr * opt.state[p]["m"] for p in weights]
            size = sum(float(u.double().square().sum()) for u in wanted) / sum(u.numel() for u in wanted)
            made = {"changed_by_step": changed(weights, before), "arrived": arrived(weights, before, wanted)}
            row(step, update=size**0.5, **made)
    return {"way": way, "seed": seed, "projected_gradient": (squares / steps) ** 0.5, "skipped": int(opt.skipped_steps),
            "seconds": round(time.perf_counter() - begun, 1), "rows": rows}  # fmt: skip


def sizes() -> dict[str, Any]:
    """Of the task: tuned parameters, texts, and the median magnitude of a weight."""
    task = demo(torch.bfloat16)
    weights = torch.cat([p.detach().flatten() for p in task.model.parameters() if p.requires_grad])
    counts = {name: len(part[1]) for name, part in task.sets.items()}
    return {"parameters": weights.numel(), "texts": counts, "median_weight": weights.float().abs().median().item()}


def main() -> None:
    args = study.parser(
        __doc__, steps=(1000, "of each run"), every=(100, "steps between evaluations"), lr=(1.5e-8, "constant"),
        seeds=(3, "runs of each way"), processes=(2, "of one thread each"),
    ).parse_args()  # fmt: skip
    torch.set_num_threads(1)
    settings = {"steps": args.steps, "every": args.every, "lr": args.lr, "beta": BETA, "eps": EPS, "batch_size": BATCH,
                "seeds": args.seeds, "processes": args.processes, "placement": PLACEMENT, **sizes()}  # fmt: skip
    order = [(way, seed) for seed in range(args.seeds) for way in WAYS]
    order.sort(key=lambda run: run[0] == "float32")  # the reference last: a run that is broken off has the comparison
    results: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with Progress() as progress, ProcessPoolExecutor(args.processes, mp_context=spawn) as pool:
        task = progress.add_task("runs", total=len(order))
        waiting = [pool.submit(tune, way, seed, args.lr, args.steps, args.every) for way, seed in order]
        for done in as_completed(waiting):
            run = done.result()
            results = sorted([*results, run], key=lambda r: (r["seed"], list(WAYS).index(r["way"])))
            whole, last = len(results) == len(order), run["rows"][-1]
            path = store("rounding", torch.device("cpu"), settings, results, args.output, complete=whole)
            progress.advance(task)
            progress.console.print(
                f"{run['way']:10} seed {run['seed']}: loss {run['rows'][0]['loss']:.4f} -> {last['loss']:.4f}, "
                f"accuracy {last['accuracy']:.1%}, changed {last['changed']:.2%}, by the last step "
                f"{last['changed_by_step']:.2%}, arrived {last['arrived']:.3f}, {run['seconds']:.0f} s"
            )
    print("stored in", path.name)


if __name__ == "__main__":
    main()

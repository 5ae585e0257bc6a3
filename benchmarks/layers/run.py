"""Times the passes of a LeZO step against those of a full one, all in one run.

    python -m benchmarks.layers.run                        # CPU, 64M parameters in 40 blocks, three quarters dropped
    python -m benchmarks.layers.run --device cuda --parameters 4000000000

The model is parameters only: 40 blocks of 12 tensors that hold 95 % of the weights, and an embedding. A step's closure
returns a number at once, so its time is that of its three passes and of what Python does around them, the draw of the
blocks and the table of addresses included. Stores benchmarks/results/layers-<device>.json. Single passes are timed by
`zokern bench kernels layers`.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import zokern
from benchmarks import study
from benchmarks.parts import load, table
from zokern.bench.record import store
from zokern.bench.timing import time_in_rounds

BLOCKS, TENSORS, IN_BLOCKS = 40, 12, 0.95


def model_of(parameters: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    each = int(parameters * IN_BLOCKS / BLOCKS / TENSORS)

    def tensors(count: int, size: int) -> nn.ParameterList:
        return nn.ParameterList(nn.Parameter(torch.randn(size, device=device).to(dtype)) for _ in range(count))

    model = nn.Module()
    model.blocks = nn.ModuleList(tensors(TENSORS, each) for _ in range(BLOCKS))
    model.embedding = tensors(1, parameters - each * BLOCKS * TENSORS)
    return model


def main() -> None:
    args = study.parser(
        __doc__, device=("cpu", "cpu or cuda"), parameters=(64_000_000, "of the model"),
        dropped=([0, 20, 30, 36], "blocks dropped, of 40"), rounds=(15, "steps timed for each"),
        dtype=(("float32", "bfloat16", "float16"), "of the weights"),
    ).parse_args()  # fmt: skip
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model, counted, steps = model_of(args.parameters, dtype, device), {}, {}
    for dropped in dict.fromkeys([0, *args.dropped]):
        layers = zokern.RandomBlocks(dropped, blocks=[f"blocks.{i}" for i in range(BLOCKS)])
        opt = zokern.MeZO(model, 1e-6, layers=layers, placement="inplace")
        loss = torch.zeros((), device=device)
        opt.step(lambda loss=loss: loss)
        counted[dropped] = opt.counters["elements_moved"]
        steps[str(dropped)] = lambda opt=opt, loss=loss: opt.step(lambda: loss)
    times, results = time_in_rounds(steps, device, args.rounds, "steps"), {}
    shown = Table("blocks dropped", "elements moved", "time of the passes")
    for name, t in times.items():
        share, moved = t["median"] / times["0"]["median"], counted[int(name)] / counted[0]
        results[name] = {**t, "share_of_full": share, "elements_share": moved}
        shown.add_row(f"{name} of {BLOCKS}", f"{moved:.3f}", f"{share:.3f}")
    Console().print(shown)
    settings = {"parameters": args.parameters, "dtype": args.dtype, "blocks": BLOCKS, "share_in_blocks": IN_BLOCKS}
    print("stored in", store("layers", device, settings, results, args.output).name)


def layers_part() -> str:
    run = load("layers-cpu.json")
    s, m = run["settings"], run["machine"]
    head = (
        f"{s['parameters'] / 1e6:.0f} million parameters ({s['dtype']}), {s['share_in_blocks']:.0%} of them in "
        f"{s['blocks']} blocks, one run on {m['threads']} threads of an {m['processor']} (`python -m "
        "benchmarks.layers.run`); a step's passes with all that Python does around them, over those of a step that drops "
        "nothing:"
    )
    rows = [[name, f"{t['elements_share']:.3f}", f"{t['share_of_full']:.3f}"] for name, t in run["results"].items()]
    return f"{head}\n\n{table(['blocks dropped', 'elements moved', 'time'], rows, tight=True)}"


PAGES = {"docs/methods/lezo.md": {"layers": layers_part}}

if __name__ == "__main__":
    main()

"""Times the passes of a LeZO step against those of a full one, all in one run.

    python benchmarks/bench_layers.py                      # CPU, 64M parameters in 40 blocks, three quarters dropped
    python benchmarks/bench_layers.py --device cuda --parameters 4000000000

The model is parameters only: 40 blocks of 12 tensors that hold 95 % of the weights, and an embedding. A step's closure
returns a number at once, so its time is that of its three passes and of what Python does around them, the draw of the
blocks and the table of addresses included. Stores benchmarks/results/layers-<device>.json.

    python benchmarks/bench_layers.py --passes [OPTIONS]   # single passes instead: `zokern bench kernels layers`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import zokern
from zokern.bench.cli import script
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--parameters", type=int, default=64_000_000, help="of the model (default: %(default)s)")
    parser.add_argument("--dropped", type=int, nargs="+", default=[0, 20, 30, 36], help="blocks dropped, of 40")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15, help="steps timed for each")
    parser.add_argument("--output", type=Path, help="where the JSON goes instead of benchmarks/results")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model, counted, steps = model_of(args.parameters, dtype, device), {}, {}
    for dropped in dict.fromkeys([0, *args.dropped]):
        layers = zokern.RandomBlocks(dropped, blocks=[f"blocks.{i}" for i in range(BLOCKS)])
        opt = zokern.MeZO(model, 1e-6, layers=layers, placement="inplace")
        loss = torch.zeros((), device=device)
        opt.step(lambda loss=loss: loss)
        counted[dropped] = opt.counters["elements_moved"]
        steps[str(dropped)] = lambda opt=opt, loss=loss: opt.step(lambda: loss)
    times = time_in_rounds(steps, device, args.rounds, "steps")
    results = {
        name: {
            **t,
            "share_of_full": t["median"] / times["0"]["median"],
            "elements_share": counted[int(name)] / counted[0],
        }
        for name, t in times.items()
    }
    table = Table("blocks dropped", "elements moved", "time of the passes")
    for name, t in results.items():
        table.add_row(f"{name} of {BLOCKS}", f"{t['elements_share']:.3f}", f"{t['share_of_full']:.3f}")
    Console().print(table)
    settings = {"parameters": args.parameters, "dtype": args.dtype, "blocks": BLOCKS, "share_in_blocks": IN_BLOCKS}
    print("stored in", store("layers", device, settings, results, args.output).name)


if __name__ == "__main__":
    if "--passes" in sys.argv:
        sys.argv.remove("--passes")
        script("layers")
    else:
        main()

"""Times the replay of a journal against the update passes that it does again, all in one run.

    python benchmarks/bench_replay.py                      # CPU, 32M parameters, 64 steps of MeZO

Stores benchmarks/results/replay-<device>.json: seconds of a replayed step over those of one update pass, for float32 and
bfloat16 weights, with the shadow placement (only updates write to the weights).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import zokern
from zokern.bench.record import store
from zokern.bench.timing import time_in_rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--parameters", type=int, default=32_000_000, help="of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="in the journal")
    parser.add_argument("--rounds", type=int, default=7, help="times that each is timed")
    parser.add_argument("--output", type=Path, help="where the JSON goes instead of benchmarks/results")
    args = parser.parse_args()
    device, results = torch.device(args.device), {}
    table = Table("weights", "a replayed step over an update pass", "journal, bytes a step")
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ParameterList([nn.Parameter(torch.randn(args.parameters, device=device).to(dtype))])
        optimizer = zokern.MeZO(model, 1e-6, placement="shadow")
        losses = iter(torch.rand(2 * args.steps).tolist())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.zkj"
            with zokern.journal.write(optimizer, path):
                empty = path.stat().st_size
                for _ in range(args.steps):
                    optimizer.step(lambda losses=losses: next(losses))
            stochastic = dtype != torch.float32
            params = [p.data for p in model]
            rounding = {"rounding": "stochastic", "rounding_seed": 3} if stochastic else {}
            times = time_in_rounds(
                {
                    "replay": lambda path=path, model=model: zokern.journal.replay(path, model, verify=False),
                    "update pass": lambda params=params, rounding=rounding: zokern.add_noise_(
                        params, tensor_ids=[0], seeds=[5], coefs=[1e-9], **rounding
                    ),
                },
                device,
                args.rounds,
                str(dtype),
            )
            ratio = times["replay"]["median"] / args.steps / times["update pass"]["median"]
            size = (path.stat().st_size - empty) / args.steps
        name = str(dtype).removeprefix("torch.")
        results[name] = {"times": times, "step_over_pass": ratio, "bytes_per_step": size}
        table.add_row(name, f"{ratio:.2f}", f"{size:.1f}")
    Console().print(table)
    settings = {"parameters": args.parameters, "steps": args.steps}
    print("stored in", store("replay", device, settings, results, args.output).name)


if __name__ == "__main__":
    main()

"""Times the replay of a journal against the update passes that it does again, all in one run.

    python -m benchmarks.replay.run                        # CPU, 32M parameters, 64 steps of MeZO

Stores benchmarks/results/replay-<device>.json: seconds of a replayed step over those of one update pass, for float32 and
bfloat16 weights, with the shadow placement (only updates write to the weights).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import zokern
from benchmarks import study
from benchmarks.parts import load
from zokern.bench.record import store
from zokern.bench.timing import time_in_rounds


def measure(dtype: torch.dtype, device: torch.device, parameters: int, steps: int, rounds: int) -> dict[str, Any]:
    model = nn.ParameterList([nn.Parameter(torch.randn(parameters, device=device).to(dtype))])
    optimizer = zokern.MeZO(model, 1e-6, placement="shadow")
    losses, params = iter(torch.rand(2 * steps).tolist()), [p.data for p in model]
    rounding = {"rounding": "stochastic", "rounding_seed": 3} if dtype != torch.float32 else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zkj"
        with zokern.journal.write(optimizer, path):
            empty = path.stat().st_size
            for _ in range(steps):
                optimizer.step(lambda: next(losses))

        def update() -> None:
            zokern.add_noise_(params, tensor_ids=[0], seeds=[5], coefs=[1e-9], **rounding)

        timed = {"replay": lambda: zokern.journal.replay(path, model, verify=False), "update pass": update}
        times = time_in_rounds(timed, device, rounds, str(dtype))
        size = (path.stat().st_size - empty) / steps
    ratio = times["replay"]["median"] / steps / times["update pass"]["median"]
    return {"times": times, "step_over_pass": ratio, "bytes_per_step": size}


def main() -> None:
    args = study.parser(
        __doc__, device=("cpu", "cpu or cuda"), parameters=(32_000_000, "of the model"),
        steps=(64, "in the journal"), rounds=(7, "times that each is timed"),
    ).parse_args()  # fmt: skip
    device, results = torch.device(args.device), {}
    shown = Table("weights", "a replayed step over an update pass", "journal, bytes a step")
    for name in ("float32", "bfloat16"):
        found = measure(getattr(torch, name), device, args.parameters, args.steps, args.rounds)
        results[name] = found
        shown.add_row(name, f"{found['step_over_pass']:.2f}", f"{found['bytes_per_step']:.1f}")
    Console().print(shown)
    settings = {"parameters": args.parameters, "steps": args.steps}
    print("stored in", store("replay", device, settings, results, args.output).name)


def replay_part() -> str:
    run = load("replay-cpu.json")
    told = " and ".join(f"{r['step_over_pass']:.2f} ({name})" for name, r in run["results"].items())
    return (
        f"Measured with `python -m benchmarks.replay.run` on {run['machine']['threads']} threads of an "
        f"{run['machine']['processor']}, {run['settings']['parameters'] / 1e6:.0f} million parameters: a replayed step "
        f"takes {told} of the time of one update pass."
    )


PAGES = {"docs/journal.md": {"replay": replay_part}}

if __name__ == "__main__":
    main()

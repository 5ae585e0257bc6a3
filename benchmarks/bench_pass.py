"""Times the pass w += c*z in place against a copy and against the ways PyTorch users write it, all in one run.

    python benchmarks/bench_pass.py                        # CPU, 32M elements, float32 and bfloat16
    python benchmarks/bench_pass.py --device cuda          # the same on a GPU, CUDA and Triton kernels

Prints a table and stores benchmarks/results/pass-<device>.json. Bandwidth counts the bytes that the pass must move: each
element read once and written once. `published` is the way of the MeZO release: draw z in the weights' dtype, scale it,
add it. `foreach` does the same in place for the whole list. `compiled` is the latter under torch.compile, which fuses a
Philox of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import zokern
from zokern import backends
from zokern.bench.record import store
from zokern.bench.timing import time_in_rounds

EPS = 1e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def published(w: torch.Tensor) -> torch.Tensor:
    z = torch.normal(mean=0, std=1, size=w.size(), device=w.device, dtype=w.dtype)
    return w + EPS * z


def foreach(w: torch.Tensor) -> None:
    torch._foreach_add_([w], [torch.randn_like(w)], alpha=EPS)


def candidates(w: torch.Tensor, *, compiled: bool) -> dict[str, Callable[[], object]]:
    other = torch.empty_like(w)
    ours: dict[str, Callable[[], object]] = {}
    for name in ("cuda", "triton", "cpu"):
        if backends.unavailable_reason(name, w.device) is not None or (name == "triton" and w.device.type == "cpu"):
            continue

        def perturb(num_seeds: int = 1, rounding: str = "nearest", kind: str = "normal", backend: str = name) -> None:
            zokern.add_noise_(
                [w],
                tensor_ids=[0],
                seeds=list(range(num_seeds)),
                coefs=[EPS] * num_seeds,
                distribution=kind,
                rounding=rounding,
                rounding_seed=7 if rounding == "stochastic" else None,
                backend=backend,
            )

        ours[f"zokern {name}"] = perturb
        ours[f"zokern {name}, 4 seeds"] = lambda f=perturb: f(num_seeds=4)
        ours[f"zokern {name}, Rademacher"] = lambda f=perturb: f(kind="rademacher")
        if w.element_size() == 2:
            ours[f"zokern {name}, stochastic rounding"] = lambda f=perturb: f(rounding="stochastic")
    peers: dict[str, Callable[[], object]] = {
        "copy": lambda: other.copy_(w),
        "published": lambda: published(w),
        "foreach": lambda: foreach(w),
    }
    if compiled:
        fused = torch.compile(foreach)
        peers["compiled"] = lambda: fused(w)
    return {**ours, **peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:n] (default: cpu)")
    parser.add_argument("--elements", type=int, default=None, help="of the tensor (default: 32M on a CPU, 1G on a GPU)")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds (default: 7 on a CPU, 30 on a GPU)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--compiled", action="store_true", help="time torch.compile's version too (slow on a CPU)")
    parser.add_argument("--json", type=Path, default=None, help="where to store the run")
    args = parser.parse_args()
    device = torch.device(args.device)
    elements = args.elements or (1 << 25 if device.type == "cpu" else 1 << 30)
    rounds = args.rounds or (7 if device.type == "cpu" else 30)
    if elements < 1 or rounds < 1:
        parser.error("--elements and --rounds must be positive")

    results, console = {}, Console()
    for name in args.dtypes:
        w = torch.randn(elements, device=device).to(DTYPES[name])
        times = time_in_rounds(candidates(w, compiled=args.compiled), device, rounds, f"{name}, {elements:,} elements")
        copy, slow = times["copy"]["median"], times["published"]["median"]
        table = Table(
            "", "ns/element", "GB/s", "time / copy", "published / time", title=f"{name}, {elements:,} elements"
        )
        for label, t in times.items():
            t["ns_per_element"] = t["median"] / elements * 1e9
            t["gb_per_s"] = 2 * w.nbytes / t["median"] / 1e9
            t["over_copy"] = t["median"] / copy
            t["speedup_over_published"] = slow / t["median"]
            columns = ("ns_per_element", "gb_per_s", "over_copy", "speedup_over_published")
            table.add_row(label, *(f"{t[column]:.2f}" for column in columns))
        console.print(table)
        results[name] = times
    path = store("pass", device, {"elements": elements, "rounds": rounds, "eps": EPS}, results, args.json)
    console.print(f"stored in {path}")


if __name__ == "__main__":
    main()

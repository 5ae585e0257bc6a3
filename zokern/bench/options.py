"""Checks of what the benchmark commands were given: a value is refused by its option's name, with what is allowed.

Lists are given with commas. Nothing heavy is imported before a value is looked at: --help reads this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zokern.bench.models import MODELS

if TYPE_CHECKING:
    import torch

UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. auto is the first GPU, where there is one.")]


def refuse(option: str, message: str) -> typer.BadParameter:
    """The error of a value that `option` cannot have."""
    return typer.BadParameter(message, param_hint=option)


def find_device(name: str) -> torch.device:
    """The torch.device of --device; refuses one that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise refuse("--device", f"{name!r} is not a device; give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise refuse("--device", f"zokern has no kernels for {name}; give cpu or cuda")
    if device.type == "cpu":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise refuse("--device", f"{name} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0)


def choices(text: str, option: str, allowed: Iterable[str]) -> tuple[str, ...]:
    """A list with commas, in the order given, each once; all: every one."""
    allowed, given = list(allowed), [part.strip() for part in text.split(",") if part.strip()]
    if given == ["all"]:
        given = allowed
    for name in given:
        if name not in allowed:
            raise refuse(option, f"{name!r} is not known; allowed: {', '.join(allowed)}, or all")
    if not given:
        raise refuse(option, f"is empty; allowed: {', '.join(allowed)}, or all")
    return tuple(dict.fromkeys(given))


def tokens(text: str, models: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Shapes like 16x32, which rows of all `models` have room for."""
    shapes = []
    for part in text.split(","):
        rows, _, length = part.strip().partition("x")
        if not (rows.isdigit() and length.isdigit() and int(rows) and int(length) > 1):
            raise refuse("--tokens", f"{part!r} is not rows x length; for example 16x32,16x256")
        shapes.append((int(rows), int(length)))
    for name in models:
        longest = MODELS[name].longest
        if max(length for _, length in shapes) > longest:
            raise refuse("--tokens", f"rows of {name} have at most {longest} tokens; run it with shorter ones")
    return tuple(dict.fromkeys(shapes))


def sizes(text: str) -> tuple[int, ...]:
    """Numbers of parameters like 10M, ascending."""
    sizes = []
    for part in (p.strip() for p in text.split(",")):
        number, unit = (part[:-1], UNITS[part[-1]]) if part[-1:] in UNITS else (part, 1)
        if not number.isdigit() or int(number) * unit < 100_000:
            raise refuse("--sizes", f"{part!r} is not a number of parameters from 100k on; for example 10M,100M,1G")
        sizes.append(int(number) * unit)
    return tuple(sorted(set(sizes)))


def limits(
    rounds: int | None, default: int, steps: int, time_limit: float | None, memory_limit: float | None
) -> dict[str, Any]:
    """What `step` and `scaling` both take, checked, as fields of step_cases.Limits. default: of the rounds."""
    for option, value, least in (("--rounds", rounds, 1), ("--steps", steps, 1), ("--time-limit", time_limit, 0)):
        if value is not None and not value >= least:
            raise refuse(option, f"is {value}; allowed: at least {least}")
    if memory_limit is not None and not memory_limit > 0:
        raise refuse("--memory-limit", f"is {memory_limit}; allowed: above 0 GB")
    limit = None if memory_limit is None else int(memory_limit * 1e9)
    return {"rounds": rounds or default, "steps": steps, "time_limit": time_limit, "memory_limit": limit}


def output_path(output: Path | None, name: str, device: torch.device) -> Path:
    """Where the results go: a file, or a directory that gets <name>-<device>.json. The directory must be there."""
    path = output or Path()
    if path.is_dir():
        path = path / f"{name}-{device.type}.json"
    if not path.parent.is_dir():
        raise refuse("--output", f"there is no directory {path.parent}; make it first")
    return path

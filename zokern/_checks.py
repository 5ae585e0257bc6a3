"""Checks of user input, and the errors they raise. Each message names the argument and the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

MAX_SEED = (1 << 63) - 1
MAX_TENSOR_ID = (1 << 32) - 1
MAX_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127
MAX_INDEX = 1 << 45  # chunks are numbered in 32 bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


_OFFLOADED = (
    'load the model whole, on one device. Weights that are offloaded (accelerate\'s cpu_offload, a device_map with "disk") '
    "are not at hand between forwards"
)


class ZokernWarning(UserWarning):
    """Something that zokern went on after, and that the user should know."""


def is_composed(t: Tensor) -> bool:
    """Whether a tensor is made of others, as torchao's quantised ones are; a DTensor is a shard, and is not meant."""
    return type(t).__name__ != "DTensor" and torch.utils._python_dispatch.is_traceable_wrapper_subclass(t)


def is_quantised(p: Tensor) -> bool:
    """Whether a parameter is one of torchao's or bitsandbytes' quantised ones, has whole numbers, or numbers of a byte."""
    numbers = p.dtype.itemsize > 1 and (p.is_floating_point() or p.is_complex())
    return is_composed(p) or not numbers or type(p).__name__ in ("Params4bit", "Int8Params")


def check_integer(value: object, name: str, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    value = int(value)  # NumPy's too
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} is {value}; it must be {f'at least {low}' if high is None else f'in [{low}, {high}]'}"
        )
    return value


def check_seed(value: object, name: str) -> int:
    return check_integer(value, name, 0, MAX_SEED)


def check_number(
    value: object,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """A finite real number in [low, high], without the ends that are open."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not isinstance(value, int | float):
        value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
    if value < low or value > high or (open_low and value == low) or (open_high and value == high):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} is {value}; it must be in {interval}")
    return float(value)


def check_flag(value: object, name: str) -> bool:
    if isinstance(value, np.bool_):
        value = bool(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(value: object, name: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(repr(c) for c in choices)}")
    return str(value)


def meant(name: str, known: Iterable[str]) -> str:
    """What to ask where a name is not known: "is 'lr' meant?"; "" where none is like it."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"is {close[0]!r} meant?" if close else ""


def brief(value: object, start: int = 0) -> str:
    """As repr() has it, cut where that is long: from `start` on."""
    text = repr(value)
    if len(text) <= 120:
        return text
    return f"{'... ' * bool(start)}{text[start : start + 100]}{' ...' * (start + 100 < len(text))}"


class _Missing:
    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def difference(name: str, a: object, b: object) -> tuple[str, str, str]:
    """What differs, and the two values, in words; of settings, the first one that does; of long texts, the place."""
    while isinstance(a, dict) and isinstance(b, dict):
        one = next(key for key in [*b, *a] if a.get(key, _MISSING) != b.get(key, _MISSING))
        name, a, b = f"{name}[{brief(one)}]", a.get(one, _MISSING), b.get(one, _MISSING)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(repr(a), repr(b), strict=False))
    start = max(sum(1 for _ in alike) - 40, 0)
    return name, brief(a, start), brief(b, start)


def describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def check_tensor(t: object, name: str) -> Tensor:
    """A tensor that a pass can work on: float32, float16 or bfloat16, row-major, with memory of its own."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{name} is {describe(t)}; zokern works on float32, float16 and bfloat16. Leave out integer, quantised and "
            "float64 tensors, or convert them."
        )
    if t.layout != torch.strided or t.device.type == "meta":
        raise ValueError(
            f"{name} is {describe(t)} with layout {t.layout}; a pass needs a dense tensor with storage"
            + (f": {_OFFLOADED}" if t.device.type == "meta" else "")
        )
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(t):
        raise TypeError(
            f"{name} is a {type(t).__name__}; pass the plain tensor inside it (for a DTensor: to_local(), with `offsets` "
            "and `strides`). A quantised one is left out after requires_grad_(False); zokern.scales(model) has its scales, "
            "and zokern.add_deltas(model) trains beside it"
        )
    if t.numel() == 0:
        raise ValueError(f"{name} is {describe(t)}: it has no elements. Leave it out.")
    if not t.is_contiguous():
        raise ValueError(
            f"{name} is {describe(t)} with strides {t.stride()}; element indices are row-major. Pass a contiguous tensor, "
            "for example p.data = p.data.contiguous() before the optimizer is made."
        )
    return t

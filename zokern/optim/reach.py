"""How far a probe may go: theta + eps sum_k a_k z(seed_k) has to be numbers of the weights' type, on the way back too.

|z| is below 8, a move in place goes from -eps z to eps z, and the multiples a_k of a probe add up to 4 at most, unless a
method says otherwise: so eps may be a 64th of the largest number of the type. Numbers that are on a device are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zokern import _checks
from zokern.passes.update import Terms

FACTOR, MULTIPLES = 16.0, 4.0
LEAST = torch.finfo(torch.float32).tiny
UNIT = frozenset({1.0, -1.0})
ROUGHEST = torch.finfo(torch.bfloat16).eps  # spacing of a type's numbers next to 1


def on_host(value: Any) -> float | None:
    """A number; None for one on a device."""
    return None if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def smallest(params: Iterable[Tensor]) -> torch.dtype:
    """The weights' type whose largest number is the smallest."""
    dtypes = {p.dtype for p in params if p.dtype in _checks.DTYPES}
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).max, default=torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_group(group: Mapping[str, Any], where: str = "") -> None:
    """Each number is good on its own; here, whether they are together, and for the weights of the group.

    Raises:
        ValueError: naming the number, its group and the limit.
    """
    lr, eps, decay = (on_host(group[name]) for name in ("lr", "eps", "weight_decay"))
    dtype = smallest(group["params"])
    most = torch.finfo(dtype).max / (FACTOR * MULTIPLES)
    if eps is not None and not LEAST <= eps <= most:
        raise ValueError(
            f"eps{where} is {eps:g}; for {_name(dtype)} weights it must be in [{LEAST:.3g}, {most:.3g}], or eps z is 0 or "
            "infinite there"
        )
    if lr is not None and decay is not None and lr * decay > _checks.MAX_FLOAT32:
        raise ValueError(
            f"lr * weight_decay{where} is {lr * decay:g}; it must be at most {_checks.MAX_FLOAT32:.3g}, the largest float32"
        )


def check_probe(terms: Terms, eps: Tensor, params: Iterable[Tensor]) -> None:
    """A probe with other multiples than 1 and -1.

    Raises:
        ValueError: for one that goes too far.
    """
    total = sum(abs(a) for a in terms.values() if not isinstance(a, Tensor))
    if total <= MULTIPLES or eps.device.type != "cpu":
        return
    dtype, largest = smallest(params), float(eps.max())
    if not total * largest * FACTOR <= torch.finfo(dtype).max:
        raise ValueError(
            f"a probe goes {total:g} times eps = {largest:g} away, too far for {_name(dtype)} weights; make eps or the "
            "multiples smaller"
        )


def check_way_back(group: Mapping[str, Any], rms: float, where: str = "") -> None:
    """In place eps z is added to the weights and taken away again, and each time they are rounded to the spacing of numbers
    as large as eps z.

    rms: of the trained weights, 0 where it is not known.

    Raises:
        ValueError: where that spacing is as large as the weights, so that nothing would be left of them.
    """
    eps = on_host(group["eps"])
    if eps is None or not 0.0 < rms <= eps * ROUGHEST:
        return
    dtype = max((p.dtype for p in group["params"] if p.dtype in _checks.DTYPES), key=_spacing, default=torch.float32)
    if rms <= eps * _spacing(dtype):
        raise ValueError(
            f"eps{where} is {eps:g}, and the weights' rms is {rms:.3g}: taking eps z away again would leave nothing of "
            f"them in {_name(dtype)}; make eps a part of the rms, or use placement='shadow', which keeps them apart"
        )


def _spacing(dtype: torch.dtype) -> float:
    """Of the numbers next to 1."""
    return torch.finfo(dtype).eps

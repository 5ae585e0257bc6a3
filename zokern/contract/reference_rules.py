"""The rules of rules.py in NumPy: one function each, float32 operations in the order that all backends keep.

A rule gets the decayed weight, a function that makes sums over the directions, its states and its group's scalars, and
returns the new weight (not yet rounded to its storage) and the new states. Equations and sources: docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from zokern._checks import check_choice
from zokern.contract.reference import Array, _as_float, _bits, _f32, fma, noise, round_to, rounding_bits, widen
from zokern.contract.rules import RULES
from zokern.contract.streams import rank_of

States = dict[str, Array]
Sums = Callable[[str, float], Array]  # name of the coefficients, start
Scalars = Mapping[str, np.float32]
ONE, ZERO = np.float32(1), np.float32(0)


def inverse_root(x: Array) -> Array:
    """1/sqrt(x) for normal x > 0, at most 1e-7 off, exactly 1 for 1; finite for x = 0."""
    y = _as_float(np.uint32(0x5F374740) - (_bits(x) >> np.uint32(1)))
    e = fma(-(x * y), y, ONE)
    q = fma(_f32("3e8cc5e4"), e, _f32("3ea0bb6e"))
    q = fma(q, e, _f32("3ebfffb3"))
    q = fma(q, e, _f32("3effffc9"))
    return fma(y * e, q, y)


def inverse(x: Array) -> Array:
    """1/x for 1e-37 < x < 1e37, at most 6e-8 off."""
    y = _as_float(np.uint32(0x7EF311C0) - _bits(x))
    for _ in range(3):
        y = fma(y, fma(-x, y, ONE), y)
    return y


def _axpy(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    return w, {}


def _scaled_axpy(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    return fma(sums("A", 0.0), inverse_root(old["h"]), w), {}


def _hizoo(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    change = sums("V", -float(group["smoothing"]))
    h = np.clip(fma(old["h"], change, old["h"]), np.float32(2.0**-64), np.float32(2.0**64))
    return fma(sums("G", 0.0), inverse_root(h), w), {"h": h}


def _hizoo_restore(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    return _hizoo(fma(sums("A", 0.0), inverse_root(old["h"]), w), sums, old, group)


def _helene(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    m = fma(group["beta1"], old["m"], sums("G", 0.0))
    h = fma(group["beta2"], old["h"], sums("V", 0.0))
    below = fma(group["gamma"], np.maximum(h, group["floor"]), group["delta"])
    return fma(m * group["step"], inverse(below), w), {"m": m, "h": h}


def _momentum(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    m = fma(group["beta"], old["m"], sums("G", 0.0))
    return fma(group["step"], m, w), {"m": m}


def _adam(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    g = sums("G", 0.0)
    m = fma(group["beta1"], old["m"], g)
    v = fma(g * group["ratio"], g, old["v"] * group["beta2"])
    below = fma(v, inverse_root(v), group["delta"])
    return fma(m * group["step"], inverse(below), w), {"m": m, "v": v}


def _adamezo(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    return fma(sums("G", 0.0) * group["step"], inverse_root(sums("V", float(group["delta"]))), w), {}


def _sign(w: Array, sums: Sums, old: States, group: Scalars) -> tuple[Array, States]:
    g = sums("G", 0.0)
    return w + np.where(g < 0, -group["step"], np.where(g > 0, group["step"], ZERO)), {}


FUNCTIONS = {
    "axpy": _axpy,
    "scaled_axpy": _scaled_axpy,
    "hizoo": _hizoo,
    "hizoo_restore": _hizoo_restore,
    "helene": _helene,
    "momentum": _momentum,
    "adam": _adam,
    "adamezo": _adamezo,
    "sign": _sign,
}


def apply(
    rule: str,
    src: Array,
    states: States,
    *,
    dtype: str,
    tensor_id: int,
    seeds: Sequence[int],
    coefs: Mapping[str, Sequence[float]],
    scalars: Mapping[str, float],
    distribution: str = "normal",
    rounding: str = "nearest",
    rounding_seed: int = 0,
    offset: int = 0,
    square_of_sum: bool = False,
    shape: Sequence[int] | None = None,
) -> tuple[Array, States]:
    """One flat tensor's pass: its new storage (as in `round_to`) and its new states in float32.

    coefs has each of the rule's coefs for each seed, scalars each of the rule's scalars. square_of_sum: V is
    (sum_k coef_k z_k)^2 + start instead of start + sum_k coef_k z_k^2. shape: as in `noise`.
    """
    check_choice(rule, "rule", tuple(FUNCTIONS))
    rank_of(distribution)  # also where nothing is drawn
    n, shared = len(src), {name: np.float32(value) for name, value in scalars.items()}
    directions = [noise(n, seed, tensor_id, offset, distribution, shape) for seed in seeds]

    def sums(name: str, start: float) -> Array:
        squared = name == "V" and square_of_sum
        total = np.full(n, 0.0 if squared else start, np.float32)
        for coef, z in zip(coefs[name], directions, strict=True):
            total = fma(np.float32(coef), z * z if name == "V" and not squared else z, total)
        return fma(total, total, np.float32(start)) if squared else total

    with np.errstate(all="ignore"):
        w = shared["decay"] * widen(src, dtype)
        if RULES[rule].direct:
            for coef, z in zip(coefs["A"], directions, strict=True):
                w = fma(np.float32(coef), z, w)
        w, changed = FUNCTIONS[rule](w, sums, states, shared)
    random = rounding_bits(n, rounding_seed, tensor_id, offset) if rounding == "stochastic" else None
    return round_to(w, dtype, rounding, random), {**states, **changed}

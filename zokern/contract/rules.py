"""The rules of a pass, by name: what each keeps, which coefficients a direction has, which numbers a group shares.

The arithmetic is in csrc/rules.h, backends/triton/rules.py and reference_rules.py; ids are places in csrc/rules.h's list. A
pass first takes the decayed weight w and the sums over its directions, in float32 and in the order of the seeds:

    "A" of a direct rule goes straight onto w;    A, G = sum_k coef_k z_k;    V = sum_k coef_k z_k^2
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Rule:
    """`direct`: the first coefficient goes onto the weight. The first `written` states are changed. half_state: states
    may be bfloat16; all may be float32."""

    name: str
    id: int
    direct: bool
    coefs: tuple[str, ...]
    scalars: tuple[str, ...] = ("decay",)
    states: tuple[str, ...] = ()
    written: int = 0
    half_state: bool = False

    @property
    def state_dtypes(self) -> tuple[str, ...]:
        """What its states may be stored as."""
        return ("float32", "bfloat16") if self.half_state else ("float32",)


_ALL = (
    Rule("axpy", 0, True, ("A",)),  # w + A
    Rule("scaled_axpy", 1, False, ("A",), states=("h",), half_state=True),  # w + A / sqrt(h)
    # h' = h + h (V - smoothing), kept within 2^-64 .. 2^64; w + G / sqrt(h'), and with A / sqrt(h) where w is perturbed
    Rule("hizoo", 2, False, ("G", "V"), ("decay", "smoothing"), ("h",), 1, True),
    Rule("hizoo_restore", 3, False, ("A", "G", "V"), ("decay", "smoothing"), ("h",), 1, True),
    # m' = beta1 m + G; h' = beta2 h + V; w + A + step m' / (gamma max(h', floor) + delta)
    Rule("helene", 4, True, ("A", "G", "V"), ("decay", "beta1", "beta2", "step", "gamma", "floor", "delta"),
         ("m", "h"), 2),
    Rule("momentum", 5, True, ("A", "G"), ("decay", "beta", "step"), ("m",), 1),  # m' = beta m + G; w + A + step m'
    # m' = beta1 m + G; v' = beta2 v + ratio G^2; w + A + step m' / (sqrt(v') + delta)
    Rule("adam", 6, True, ("A", "G"), ("decay", "beta1", "beta2", "ratio", "step", "delta"), ("m", "v"), 2),
    Rule("adamezo", 7, True, ("A", "G", "V"), ("decay", "step", "delta")),  # w + A + step G / sqrt(V + delta)
    Rule("sign", 8, True, ("A", "G"), ("decay", "step")),  # w + A + step sign(G)
)  # fmt: skip
RULES = {rule.name: rule for rule in _ALL}


def rule_called(name: str) -> Rule:
    """Raises ValueError for a name that is none of a rule, with those that there are."""
    if name not in RULES:
        raise ValueError(f"rule is {name!r}; it must be one of {', '.join(map(repr, RULES))}")
    return RULES[name]

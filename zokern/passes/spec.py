"""A pass as two records, from the method that wants it to the kernel that does it: which arithmetic, and which numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from zokern.contract.rules import RULES, Rule
from zokern.contract.streams import ROUNDINGS
from zokern.directions import DIRECTIONS, Direction, rank

MAX_STAGES, MAX_CHAIN_SEEDS = 32, 128  # csrc/pass.h
MAX_PASS_SEEDS = ((1 << 31) - 1) // 3  # kernels count coefficients, up to three a seed, in 32 bits


@dataclass(frozen=True)
class PassSpec:
    """Which arithmetic.

    rounding: of 16-bit weights, "nearest" or "stochastic". square_of_sum: V is (sum_k coef_k z_k)^2 and not
    sum_k coef_k z_k^2. keep_second: the second state is read but not written. rule and direction have no defaults, as
    torch.compile of PyTorch 2.10 cannot trace such a call.

    Raises:
        ValueError: for a rounding that there is not.
    """

    rule: Rule
    direction: Direction
    rounding: str = "nearest"
    square_of_sum: bool = False
    keep_second: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {self.rounding!r}; it must be one of {', '.join(map(repr, ROUNDINGS))}")

    @functools.cached_property
    def flags(self) -> tuple[bool, bool, bool, bool]:
        """In the order of csrc/pass.h's Pass."""
        return self.direction.name == "rademacher", self.rounding == "stochastic", self.square_of_sum, self.keep_second

    @functools.cached_property
    def rank(self) -> int:
        """Of its direction, 0 where elements are independent."""
        return rank(self.direction)

    @functools.cached_property
    def dense(self) -> PassSpec:
        """For tensors that take dense noise where the direction is of low rank."""
        return replace(self, direction=DIRECTIONS["normal"]) if self.rank else self

    @functools.cached_property
    def exact(self) -> PassSpec:
        """For float32 weights, which have nothing to round."""
        return replace(self, rounding="nearest")


AXPY = PassSpec(RULES["axpy"], DIRECTIONS["normal"])
# The same few are asked for in every step.
pass_spec = functools.lru_cache(maxsize=256)(PassSpec)


@dataclass(frozen=True)
class PassNumbers:
    """What it is told, in host or device memory.

    seeds int64 [K], coefs float32 [G, C, K], shared float32 [G, S], rounding_seed int64 [2], enabled int32 [1]

    G groups (rows), K directions; C and S are the numbers of the rule's coefs and scalars. The two rounding seeds are the
    weights' and a state's. `enabled` with a zero in it makes the pass write nothing: a step is skipped without asking the
    device. elsewhere: these numbers where they were sent, so that several passes send them once.
    """

    seeds: Tensor
    coefs: Tensor
    shared: Tensor
    rounding_seed: Tensor | None = None
    enabled: Tensor | None = None
    elsewhere: dict[object, PassNumbers] = field(
        default_factory=dict, repr=False, compare=False
    )  # by backend and device
    checked: ClassVar[Rule | None] = None  # of one that has been looked at: the rule whose sizes it has


@dataclass(frozen=True)
class Chain:
    """Passes over the same tensors, done one after another in registers, each with its own rounding: the bits are theirs.

    Each is `rule` or `rule_of_probes(rule)`; their own `enabled` is not looked at. fork: the last, a perturbation, goes to
    the table's probes, and is done also where `enabled` says that nothing else is.
    """

    stages: Sequence[tuple[PassSpec, PassNumbers]]
    rule: Rule
    fork: bool = False
    enabled: Tensor | None = None

    @property
    def seeds(self) -> list[Tensor]:
        """Of each stage."""
        return [numbers.seeds for _, numbers in self.stages]

    @property
    def keep_second(self) -> bool:
        return not any(spec.rule.written == 2 and not spec.keep_second for spec, _ in self.stages)


def rule_of_probes(rule: Rule) -> Rule:
    """What perturbs for a rule: directions over the root of the curvature where it has one."""
    return RULES["scaled_axpy" if rule.states == ("h",) else "axpy"]

"""What a pass is told besides its tensors: a few numbers, each a tensor so that it may come from host or device memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zokern.rules import RULES, Rule


@dataclass(frozen=True)
class Scalars:
    """seeds int64 [K], coefs float32 [G, C, K], shared float32 [G, S], rounding_seed int64 [2], enabled int32 [1].

    C and S are the numbers of the rule's coefs and scalars. The two rounding seeds are the weights' and a state's.
    `enabled` with a zero in it makes the pass write nothing: a step is skipped without asking the device.
    """

    seeds: Tensor
    coefs: Tensor
    shared: Tensor
    rounding_seed: Tensor | None = None
    enabled: Tensor | None = None


@dataclass(frozen=True)
class Kind:
    """Which arithmetic. `square_of_sum`: V is (sum_k coef_k z_k)^2. `keep_second`: the second state is not written."""

    rule: Rule = RULES["axpy"]
    distribution: str = "normal"
    rounding: str = "nearest"
    square_of_sum: bool = False
    keep_second: bool = False

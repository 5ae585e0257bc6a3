"""The few numbers of a pass, each a tensor so that it may come from host or device memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scalars:
    """Seeds int64 [K], coefs float32 [G, K], decays float32 [G]; rounding_seed int64 [1]; enabled int32 [1].

    `enabled` with a zero in it makes the pass write nothing: a step is skipped without asking the device.
    """

    seeds: Tensor
    coefs: Tensor
    decays: Tensor
    rounding_seed: Tensor | None
    enabled: Tensor | None

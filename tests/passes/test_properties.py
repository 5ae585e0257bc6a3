"""The pass on random shapes, alignments and offsets; apart from test_ops.py, because hypothesis is not everywhere."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zokern

shapes = st.lists(st.integers(1, 13), min_size=0, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(shapes, st.integers(0, 9), st.integers(0, 2**45 - 10**5)), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.floats(-1024, 1024, width=32)), max_size=3),
    st.sampled_from(["normal", "rademacher"]),
    st.sampled_from([None, 0, 2**63 - 1]),
)
def test_property_any_shapes_alignments_offsets(tensors, dtype, directions, distribution, rounding_seed) -> None:
    """Shapes (0-d too), start addresses and offsets in any combination: the bits are the reference's."""
    results = []
    for backend in ("cpu", "reference"):
        views = []
        for shape, start, _ in tensors:
            n = int(np.prod(shape))
            pool = torch.linspace(-1, 1, n + 10, dtype=torch.float64).to(dtype)
            views.append(pool[start : start + n].view(shape))
        zokern.add_noise_(
            views,
            tensor_ids=list(range(len(views))),
            seeds=[s for s, _ in directions],
            coefs=[c for _, c in directions],
            offsets=[o for _, _, o in tensors],
            distribution=distribution,
            rounding="nearest" if rounding_seed is None else "stochastic",
            rounding_seed=rounding_seed,
            backend=backend,
        )
        results.append(views)
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected), f"{int((got != expected).sum())} of {got.numel()} elements differ"

"""Which ranks' steps a graph can hold, as far as that is known without a GPU."""

from __future__ import annotations

import zokern
from tests.distributed.ranks import run
from tests.models import small
from zokern.distributed.places import Places


def reasons() -> list[str | None]:
    told = []
    for backend, options in ((None, {}), ("nccl", {}), ("nccl", {"compare_every": 5})):
        opt = zokern.MeZO(small(), 1e-2, parallel="data", **options)
        if backend is not None:
            Places.backend = lambda self, device, backend=backend: backend  # type: ignore[method-assign]
        told.append(opt.why_not_graphed())
    return told


def test_the_exchange_has_to_be_the_device_s_own() -> None:
    for gloo, nccl, comparing in run(2, reasons):
        assert 'through gloo, which no graph can hold: init_process_group("cpu:gloo,cuda:nccl")' in gloo
        assert nccl is None
        assert "compare_every reads all weights on the host" in comparing

"""What all ranks of a run have to have the same: at its start, and in each round."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zokern.distributed.places import Places
from zokern.hashing import hash_of
from zokern.optim.losses import Losses
from zokern.optim.numbers import HYPER, NUMBERS
from zokern.parts import is_dtensor
from zokern.passes.update import Terms


def whole(owner: Any) -> list[tuple[str, Tensor]]:
    """This rank's whole tensors: no shards, and none of a pipeline's other stages, which have no numbers here."""
    return [(name, p) for name, p in owner.weights().items() if not is_dtensor(p) and not p.is_meta]


def _states(owner: Any) -> list[tuple[str, Tensor]]:
    """What the method keeps for each whole tensor."""
    return [
        (f"{name}: {key}", value)
        for name, p in whole(owner)
        for key, value in owner.state.get(p, {}).items()
        if isinstance(value, Tensor)
    ]


def at_start(owner: Any, places: Places) -> dict[str, Any]:
    """What all ranks have to start with."""
    return {
        "method": type(owner).__name__,
        "seed": owner.seed,
        "the list of ranks": list(places.ranks),
        "each rank's part of the batch": list(places.data),
        "each rank's share of the directions": list(places.share),
        "placement": {"stream": "shadow"}.get(owner.placement, owner.placement),
        **{f"setting {name}": value for name, value in owner.options.items()},
        **rates(owner),
        "the number of steps done": owner.counters["steps"],
        "tensors": [p[:4] for p in owner.layout()["params"]],
        "setting compare_every": owner.compare_every,
        "weights": hash_of(whole(owner)),
        "states": hash_of(_states(owner)),
    }


def rates(owner: Any) -> dict[str, float]:
    """lr, eps and weight_decay of each group, as far as they are the host's."""
    return {
        f"{name} of group {g}": float(value)
        for g, group in enumerate(owner.param_groups)
        for name in HYPER
        if type(value := group[name]) in NUMBERS or value.device.type == "cpu"
    }


def fingerprint(about: dict[str, Any]) -> int:
    """A hash that travels as an int64."""
    return int.from_bytes(hashlib.blake2b(repr(about).encode(), digest_size=7).digest(), "little")


def in_a_round(owner: Any, losses: Losses, probes: Sequence[Terms], whole: bool, drawn: str) -> dict[str, Any]:
    """What all ranks have to agree on in a round, as far as the host knows it. whole: they train the same tensors. drawn: a
    hash of where torch's generator was, where ranks share out directions and forwards draw."""
    ids = [member.tensor_id for member in owner.active.sweep] if whole else []
    return {
        "the number of trained tensors": len(ids),
        "the ids of the trained tensors": ids,
        "rounding": owner.rounding,
        "the state of torch's generator (torch.manual_seed)": drawn,
        "the number of probes": len(probes),
        "the seeds of the directions": [[seed for seed in terms if isinstance(seed, int)] for terms in probes],
        **rates(owner),
        "reduction": losses.reduction,
        "maximize": losses.maximize,
        "loss_weights": losses.loss_weights,
        "batched": type(losses) is not Losses,
    }

"""Where perturbed weights live during a forward. One file each; each presents theta + eps d, d = sum_k a_k z(seed_k).

inplace: in the weights themselves. No memory; a forward's perturbation and restore each round, so 16-bit weights drift.
    Sensible for float32.
shadow: in a copy of the active parameters, which the module sees while the closure runs. The weights' own storage is
    written by updates alone: restore is free and exact. Costs the memory of the active parameters once more.
stream: as shadow, but one block at a time, written just before the block runs: the memory of the largest block and of
    what lies outside the blocks.
forward: weights are not written at all: products with them get two thin ones of the direction's factors (LowRank) added.
    The memory of the factors, and of copies of norms and biases.
auto: for float32 weights inplace. Where any has 16 bits: stream if the module's blocks are found and it can serve it,
    else shadow; inplace for parameters without a module. What was chosen for 16-bit weights is printed once. It is chosen
    anew when the weights' types change, and where stream refuses a closure that
    shadow serves, the step goes on with shadow.

A method with a curvature h asks for `scaled` directions: theta + eps d / sqrt(h).
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import nn

from zokern import _checks
from zokern.placement import fsdp, gathered, stream
from zokern.placement.base import Ahead, Placement, Refused, Rounding
from zokern.placement.forward import SCALED, Forward
from zokern.placement.gathered import Gathered, Kept
from zokern.placement.gathered_ahead import GatheredAhead
from zokern.placement.inplace import InPlace
from zokern.placement.pending import ForwardPending
from zokern.placement.prefetched import Prefetched
from zokern.placement.shadow import Shadow
from zokern.placement.stream import Stream
from zokern.sweep import Passes

__all__ = [
    "PLACEMENTS",
    "Ahead",
    "Forward",
    "InPlace",
    "Placement",
    "Refused",
    "Rounding",
    "Shadow",
    "Stream",
    "choose",
    "make",
    "read",
]

MADE: dict[str, type[Any]] = {cls.name: cls for cls in (InPlace, Shadow, Stream, Forward)}
PLACEMENTS = ("auto", *MADE)
OF_SHARDS: dict[str, type[Any]] = {cls.name: cls for cls in (InPlace, Kept, Gathered)}  # for modules of FSDP2
NEEDED = (*Placement.__annotations__, *(name for name in vars(Placement) if not name.startswith("_")))
_announced: set[str] = set()
_bound: dict[int, weakref.ref[object]] = {}  # objects of users that serve an optimizer, by id


def choose(
    module: nn.Module | None, sixteen_bit: bool, scaled: bool = False, prefetch: bool = False
) -> tuple[str, str]:
    """What "auto" stands for, and why."""
    if not sixteen_bit:
        return "inplace", "float32 weights round too little to drift"
    if module is None:
        return "inplace", "there is no module to show copies to, so 16-bit weights will drift: pass the nn.Module"
    if fsdp.modules_of(module):
        return _choose_sharded(module, scaled)
    try:
        stream.refuse(module)
    except ValueError as error:
        return "shadow", f"16-bit weights stay exact; {error}"
    extra = stream.extra_bytes(module, prefetch=prefetch) / max(sum(p.nbytes for p in module.parameters()), 1)
    return "stream", f"16-bit weights stay exact; it takes {extra:.1%} more memory than the model alone"


def _choose_sharded(module: nn.Module, scaled: bool) -> tuple[str, str]:
    """Of a module of FSDP2 with 16-bit weights."""
    if scaled:
        return (
            "shadow",
            f"16-bit weights stay exact, for a copy of each rank's shards; {gathered.SCALED.split(', so')[0]}",
        )
    try:
        gathered.refuse(module)
    except ValueError as error:
        return "shadow", f"16-bit weights stay exact, for a copy of each rank's shards; {error}"
    return "stream", "16-bit weights stay exact: what FSDP2 gathers is perturbed, and nothing copied"


def read(wanted: object, name: str = "placement") -> object:
    """A name of PLACEMENTS, or an object that has what a placement needs.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an object that lacks a method of `Placement`.
    """
    if isinstance(wanted, str):
        return _checks.check_choice(wanted, name, PLACEMENTS)
    missing = [method for method in NEEDED if not hasattr(wanted, method)]
    if isinstance(wanted, type) or missing:
        what = f"the class {wanted.__name__}" if isinstance(wanted, type) else f"a {type(wanted).__name__}"
        raise TypeError(
            f"{name} is {what}; it must be one of {', '.join(map(repr, PLACEMENTS))}, or an object with the methods of "
            f"zokern.placement.Placement" + (f" (it has no {', '.join(missing)})" if missing else "")
        )
    return wanted


def make(
    wanted: object,
    module: nn.Module | None,
    sixteen_bit: bool,
    passes: Passes,
    *,
    scaled: bool = False,
    pipelined: bool = False,
    prefetch: bool = False,
    waits: bool = False,
) -> Placement:
    """The placement that `wanted`, which was `read`, names or is, bound; `sixteen_bit` says whether any parameter has a
    16-bit type. scaled: directions are divided by the root of a state. prefetch: blocks are filled
    ahead, which "stream" alone has. waits: updates may wait to be folded, which "forward" alone can show.

    Raises:
        ValueError: for a placement that cannot serve the module, with the remedy.
    """
    if waits and wanted == Forward.name:
        placement: Placement = ForwardPending()
    else:
        name = _resolved(wanted, module, sixteen_bit, scaled, prefetch) if isinstance(wanted, str) else ""
        placement = _made(name, module, scaled, prefetch) if name else _own(wanted)
    if pipelined and isinstance(placement, Gathered | Kept):
        raise ValueError(gathered.PIPELINED)
    if pipelined and not isinstance(placement, Shadow | Stream):
        raise ValueError(
            f"pipelined=True writes the next perturbation to copies while it updates, and placement={placement.name!r} has "
            "none; use placement='shadow' or 'stream' with an nn.Module"
        )
    if prefetch and not prefetches(placement):
        raise ValueError(why_no_prefetch(placement, wanted))
    if scaled and isinstance(placement, Forward):
        raise ValueError(SCALED)
    placement.bind(module, passes)
    return placement


def prefetches(placement: Placement) -> bool:
    return isinstance(placement, Prefetched | GatheredAhead)


def why_no_prefetch(placement: Placement, wanted: object) -> str:
    return (
        "prefetch=True fills the next block's scratch while a block runs, which "
        f"placement={placement.name if isinstance(wanted, str) else wanted!r} does not; use placement='stream', by its "
        "name and with an nn.Module, or leave prefetch out"
    )


def _made(name: str, module: nn.Module | None, scaled: bool, prefetch: bool) -> Placement:
    """Of a module of FSDP2 the weights that forwards see are none of its own parameters."""
    placement: Placement
    if not fsdp.modules_of(module):
        placement = Prefetched() if prefetch and name == Stream.name else MADE[name]()
        return placement
    if name == Forward.name:
        raise ValueError(gathered.FORWARD)
    if name == Gathered.name and scaled:
        raise ValueError(gathered.SCALED)
    placement = GatheredAhead() if prefetch and name == Gathered.name else OF_SHARDS[name]()
    return placement


def _resolved(name: str, module: nn.Module | None, sixteen_bit: bool, scaled: bool, prefetch: bool) -> str:
    if name == "auto":
        name, reason = choose(module, sixteen_bit, scaled, prefetch)
        if sixteen_bit and name not in _announced:
            _announced.add(name)
            print(f"zokern: placement='auto' is {name!r} here ({reason})", file=sys.stderr)
    return name


def _own(wanted: object) -> Placement:
    """An object of the user's, for one optimizer."""
    assert isinstance(wanted, Placement)
    user = _bound.get(id(wanted))
    if user is not None and user() is wanted:
        raise ValueError("placement is in use by another optimizer already; make one for each")
    _bound[id(wanted)] = weakref.ref(wanted)
    return wanted

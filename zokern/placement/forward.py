"""Forwards see weights plus matrices of low rank, which are never written out: a probe writes to no weight.

Along a direction of low rank, x (W + e U^T V)^T is x W^T plus two thin products. While a closure runs, the module's entries
for such matrices are `PlusLowRank` (plus.py), which compute so; all other active parameters, norms and biases, are small
copies as under shadow. A matrix that something else than products and lookups uses is written out there and then, and is a
copy from the next step on, which is said once: nothing is ever silently unperturbed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from zokern import deltas
from zokern.contract.streams import matrices
from zokern.directions import rank
from zokern.passes.spec import PassNumbers
from zokern.passes.update import Seed, Terms, same_seed
from zokern.placement import parts as _parts  # noqa: F401  what is computed with a stand-in, and with its parts
from zokern.placement import plus, sites
from zokern.placement import thin as _products  # noqa: F401
from zokern.placement.base import NotSeen, RefusedModule
from zokern.placement.factors import Factors, Views, by_device
from zokern.placement.plus import DTYPES, OWN, PlusLowRank
from zokern.placement.rows import Rows
from zokern.placement.shadow import Shown
from zokern.placement.together import Together
from zokern.placement.units import freezing
from zokern.placement.unused import Unused
from zokern.sweep import NOTHING, Member, Passes, Sweep

SCALED = (
    "placement='forward' perturbs along matrices of low rank, and this method along z / sqrt(h), which has full rank; use "
    "placement='shadow', or a method without a curvature"
)


KEPT = 4  # layouts of probes that share a forward; a step has one for each round


class Forward(Shown):
    """proves: whether a probe that computes with none of the matrices is an error. copied: matrices that something else has
    used, by name, and which function: they are copies since."""

    name = "forward"
    factors_of: type[Factors] = Factors
    blocks: type[Together] = Together

    def __init__(self, *, proves: bool = True) -> None:
        super().__init__()
        self.proves = proves
        self.copied: dict[str, str] = {}
        self._copied: dict[int, Tensor] = {}  # by id, held so that no other tensor gets it
        self.lower, self.dense = NOTHING, NOTHING  # the step's members with stand-ins, and the others
        self._at: tuple[list[int], list[int]] = [], []  # which they are
        self.stand_ins: list[PlusLowRank] = []
        self.written: set[int] = set()  # which of them something has asked for its sum, in this probe
        self.factors: dict[torch.device, Factors] = {}
        self.aimed: dict[torch.device, list[Views]] = {}  # what the stand-ins look at
        self.addresses: list[int] = []
        self.filled: Sequence[Seed] = ()  # whose factors the buffers hold
        self.terms: Terms = {}
        self.said = 0  # how many of `copied`
        self.unused = Unused()
        self.together: dict[tuple[int, int], Together] = {}  # by the number of blocks, and of each one's directions

    def bind(self, module: nn.Module | None, passes: Passes) -> None:
        super().bind(module, passes)
        self.rank = rank(passes.direction)
        if not self.rank:
            raise ValueError(
                "placement='forward' perturbs by matrices of low rank, and distribution is "
                f"{passes.direction.name!r}; give distribution=zokern.LowRank(1), or use another placement"
            )
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        if trainable and not any(matrices(p.shape, self.rank) for p in trainable):
            raise ValueError(
                f"placement='forward' has nothing to do: no trainable matrix of {type(self.module).__name__} has both "
                f"sides above rank {self.rank}; use placement='shadow', or a lower rank"
            )

    def begin(self, sweep: Sweep, eps: Tensor, *, scaled: bool) -> None:
        if scaled:
            raise ValueError(SCALED)
        if freezing():
            raise RefusedModule(
                "torch._inductor.config.freezing makes constants of what placement='forward' writes to: switch it off"
            )
        super().begin(sweep, eps, scaled=scaled)
        self.filled = ()

    # ---------------------------------------------------------------------------------------------------- what is shown

    def _lay_out(self, members: Sweep) -> Mapping[int, nn.Parameter]:
        layout = members.layout, [m.row for m in members], list(self._copied)
        if layout != self.layout or self.moved(self.copies) or self.addresses != members.addresses:
            self.layout, self.copies, self.stand_ins, self.aimed = None, [], [], {}
            self.written.clear()
            self.let_go()
            self._at = self.split(members)
            sites.fit(self.pools, sites.sizes(members.piece(self._at[1])))
            self.copies = sites.copies(members.piece(self._at[1]), self.pools)
            self.stand_ins = self._stand_in(members.piece(self._at[0]))
            self.unused.probed = 0
            self.layout, self.addresses = layout, list(members.addresses)
            self.places = list(map(Tensor.data_ptr, self.copies))
        self.lower, self.dense = members.piece(self._at[0]), members.piece(self._at[1])
        return {
            **{id(m.param): copy for m, copy in zip(self.dense, self.copies, strict=True)},
            **{id(m.param): one for m, one in zip(self.lower, self.stand_ins, strict=True)},
        }

    def split(self, members: Sequence[Member]) -> tuple[list[int], list[int]]:
        """Which of them get stand-ins, and which copies."""
        owners: dict[int, list[nn.Module]] = {}
        for site in sites.find(self.module, members, self.name):
            owners.setdefault(id(site.param), []).append(site.owner)
        lower = [i for i, m in enumerate(members) if self._is_lower(m, owners[id(m.param)])]
        return lower, sorted(set(range(len(members))) - set(lower))

    def _is_lower(self, m: Member, owners: Sequence[nn.Module]) -> bool:
        """Whether it is a whole, plain matrix that its modules keep nowhere else (as nn.LSTM does) and do not write to (as
        an embedding with max_norm does)."""
        if matrices(m.param.shape, self.rank) is None or m.offset or m.stride or id(m.param) in self._copied:
            return False
        plain = (
            type(m.param) in (nn.Parameter, deltas.Delta)
            and m.param.layout == torch.strided
            and m.param.dtype in DTYPES
        )
        # A stand-in has the attributes that libraries hang on parameters, and its own.
        return (
            plain
            and not OWN & m.param.__dict__.keys()
            and all(
                type(owner).__setattr__ is nn.Module.__setattr__ and getattr(owner, "max_norm", None) is None
                for owner in owners
            )
        )

    def _stand_in(self, lower: Sweep) -> list[PlusLowRank]:
        """Stand-ins, whose factors are yet to come."""
        before, self.factors = self.factors, {}
        for device, at in by_device(lower).items():
            pools = before[device].pools if device in before else {}
            self.factors[device] = self.factors_of([lower[i] for i in at], at, self.rank, self.passes.backend, pools)
        me = weakref.ref(self)
        return [plus.standing_for(m.param, m.name, functools.partial(_write, me, i)) for i, m in enumerate(lower)]

    def write(self, i: int) -> nn.Parameter:
        """The sum that a stand-in is, written out."""
        if not self.presented:
            raise NotSeen(
                f"{self.stand_ins[i].parameter} was taken inside the closure and is used outside of it, where "
                "placement='forward' has no perturbed weights"
            )
        p = self.lower[i].param
        deltas.refuse_sum(p, self.lower[i].name)
        self.written.add(i)
        with torch.inference_mode(False):
            copy = nn.Parameter(torch.empty_like(p, requires_grad=False), p.requires_grad)
        self.passes.run(Sweep([self.lower[i]]), self.spec, self.numbers_of(self.terms), out=[copy], counted=False)
        return copy

    # --------------------------------------------------------------------------------------------------------- a probe

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        with self._presented(terms) if terms else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _presented(self, terms: Terms) -> Iterator[None]:
        self.terms = terms
        self._forget_sums()
        if self.addresses != self.sweep.addresses:
            self._follow()
        self._aim(self.numbers_of(terms))
        self.perturb(self.dense, terms, self.copies, counted=False)
        try:
            self._show(copies=True)
            self.saving, plus.USED[0] = False, False
            with plus.looked_through():
                yield
            self.check_saved()
            self._check_used()
        finally:
            self._show(copies=False)
            self._forget_sums()

    def _forget_sums(self) -> None:
        """Of the probe that is over, also where it was broken off."""
        for i in sorted(self.written):
            one, m = self.stand_ins[i], self.lower[i]
            if one.full is not None:
                self._copied[id(m.param)], self.copied[m.name] = m.param, one.by
            one.full = None
        self.written.clear()

    @property
    def written_out(self) -> set[int]:
        """Ids of matrices that something else than products and lookups has used."""
        return set(self._copied)

    @property
    def modules(self) -> object:
        """Of the step: differs once a module or a parameter is another one."""
        return None if self.tree is None else self.tree[0]

    def numbers_of_block(self, seeds: Tensor, coefs: Tensor) -> PassNumbers:
        """Of the pass that writes a block's copies. seeds [K], coefs float32 [R, 1, K]: the block's directions."""
        return PassNumbers(seeds, coefs, self.still)

    def present_together(self, probes: Sequence[Terms], rows: Rows) -> AbstractContextManager[None]:
        """As `present`, of a probe for each block of a batch's rows."""
        key = len(probes), max(1, *map(len, probes))
        if key not in self.together:
            if len(self.together) == KEPT:
                del self.together[next(iter(self.together))]
            self.together[key] = self.blocks(self)
        return self.together[key].present(probes, rows)

    def _follow(self) -> None:
        """The closure of the probe before has given weights another storage."""
        for one, m in zip(self.stand_ins, self.lower, strict=True):
            if one.base.data_ptr() != m.param.data_ptr():
                if (m.param.shape, m.param.dtype, m.param.device) != (one.base.shape, one.base.dtype, one.base.device):
                    raise RuntimeError(f"the closure has made another tensor of {m.name}; do it before the step")
                one.base, one.leaf = m.param.detach(), nn.Parameter(m.param.detach(), m.param.requires_grad)
        self.addresses = list(self.sweep.addresses)

    def _aim(self, numbers: PassNumbers) -> None:
        """Factors and scales of these directions go to where the stand-ins look at them."""
        seeds, coefs = tuple(self.terms), numbers.coefs[:, 0]
        filled, self.filled = self.filled, ()
        anew = len(seeds) != len(filled) or not all(map(same_seed, seeds, filled))
        for device, factors in self.factors.items():
            self._look_at(device, factors.of(*coefs.shape))
            factors.rescale(coefs)
            if anew:
                factors.fill(numbers.seeds)
        self.filled = seeds

    def _look_at(self, device: torch.device, views: list[Views]) -> None:
        if self.aimed.get(device) is not views:
            self.aimed.pop(device, None)  # until all of them do
            for i, (left, right, scale) in zip(self.factors[device].at, views, strict=True):
                one = self.stand_ins[i]
                one.left, one.right, one.scale = left, right, scale
            self.aimed[device] = views

    def _check_used(self) -> None:
        if self.proves and self.stand_ins and not plus.USED[0] and not plus.TRACED[0]:
            raise NotSeen(
                f"the closure computed with none of the {len(self.stand_ins)} matrices "
                f"({self.stand_ins[0].parameter}, ...) of the module that the optimizer was given, so it runs something "
                "else: a copy, a trace, an export, an engine. Call the module itself; where the other one shares its "
                "memory, placement='inplace' reaches it"
            )
        if self.proves:
            self.unused.look(self.stand_ins)

    def end(self) -> None:
        super().end()
        self.terms, self.filled, self.lower, self.dense = {}, (), NOTHING, NOTHING
        if len(self.copied) > self.said:
            self.said = len(self.copied)
            name, by = list(self.copied.items())[-1]
            print(
                f"zokern: placement='forward' perturbs a copy of {len(self.copied)} of {len(self.stand_ins)} matrices, "
                f"which something else than a product or a lookup has used ({name}: {by}, ...)",
                file=sys.stderr,
            )

    def overwritten(self) -> None:
        super().overwritten()
        self.filled = ()
        for one in self.together.values():
            one.filled = []

    def memory(self) -> list[Tensor]:
        return [
            *super().memory(),
            *(t for factors in self.factors.values() for t in factors.memory()),
            *(t for one in self.together.values() for t in one.memory()),
        ]


def _write(placement: weakref.ref[Forward], i: int) -> Tensor:
    found = placement()
    if found is None:
        raise NotSeen("a perturbed weight is used after the optimizer that perturbed it is gone")
    return found.write(i)


def extra_bytes(placement: Forward, members: Sequence[Member], seeds: int = 1) -> int:
    """The memory that it needs beside these weights: copies, and the factors of so many seeds."""
    lower, copied = ([members[i] for i in at] for at in placement.split(members))
    total = sum(size * dtype.itemsize for (_, dtype), size in sites.sizes(copied).items())
    return total + sum(
        Factors.nbytes([lower[i] for i in at], placement.rank, seeds) for at in by_device(lower).values()
    )

"""placement="forward" with updates that wait: forwards see D W + sum_k c_k z_k + eps d, of which only W lies in memory.

The terms of the last steps are further matrices of low rank in the forwards, until one pass folds them into W. Their
factors stay in the places in which probes have left them, and the next step's probes come behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zokern.contract.rules import RULES
from zokern.contract.streams import ROUNDING_STREAM, STATE_STREAM, derive_seed
from zokern.directions import Direction
from zokern.passes.spec import PassNumbers, PassSpec, pass_spec
from zokern.passes.update import CPU, Seed, Terms, along, same_seed, seed_tensor, sent
from zokern.placement.factors import Factors, Views
from zokern.placement.forward import Forward
from zokern.placement.plus import PlusLowRank
from zokern.placement.rows import Rows
from zokern.placement.together import Together
from zokern.sweep import Member, Sweep


class TogetherPending(Together):
    """Blocks of rows share what waits: each weight below their own directions is the stand-in that has it."""

    def _lay_out(self, count: int, width: int) -> None:
        super()._lay_out(count, width)
        owner = self.owner
        assert isinstance(owner, ForwardPending)
        waits = owner.show_pending()
        stand_ins = {id(m.param): one for m, one in zip(owner.lower, owner.stand_ins, strict=True)}
        for m, matrix in zip(self.lower, self.matrices, strict=True):
            if type(matrix.base) is not PlusLowRank:
                vars(matrix)["plain"] = matrix.base, matrix.leaf
            matrix.base, matrix.leaf = (stand_ins[id(m.param)], None) if waits else vars(matrix)["plain"]


@dataclass(frozen=True)
class Pending:
    """What waits to be added to the weights W of R rows: D W + sum_k c_k z(seed_k).

    coefs float64 [R, K], decay float64 [R]: c and D. steps: how many it is of. decays: whether any of these had a weight
    decay; else D is 1.
    """

    seeds: tuple[Seed, ...] = ()
    coefs: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64, device=CPU))
    decay: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.float64, device=CPU))
    steps: int = 0
    decays: bool = False

    def plus(self, seeds: Sequence[Seed], coefs: Tensor, decay: Tensor, *, decays: bool) -> Pending:
        """With the update of one more step: decay w + sum_k coefs_k z_k of what is there. coefs [R, K], decay [R], on one
        device, of any type of floating point."""
        coefs, decay = coefs.to(torch.float64), decay.to(torch.float64)
        if self.steps:
            coefs = torch.cat([sent(self.coefs, coefs.device) * decay[:, None], coefs], dim=1)
            decay = sent(self.decay, decay.device) * decay
        return Pending((*self.seeds, *seeds), coefs, decay, self.steps + 1, self.decays or decays)

    def after(self, one: PassNumbers, *, decays: bool) -> Pending:
        """`plus` of an update as a journal has it."""
        return self.plus(one.seeds.tolist(), one.coefs[:, 0], one.shared[:, 0], decays=decays)

    def numbers(
        self, eps: Tensor, terms: Terms, rounding_seeds: Tensor | None = None, enabled: Tensor | None = None
    ) -> PassNumbers:
        """Of the pass from W to what forwards see: rounded to float32, once."""
        coefs = self.coefs
        if terms:
            probe = along(eps, terms, list(terms))
            coefs = torch.cat([sent(coefs, probe.device), probe], dim=1)
        shared = sent(self.decay, coefs.device).to(torch.float32).unsqueeze(1)
        seeds = seed_tensor([*self.seeds, *terms])
        return PassNumbers(seeds, coefs.to(torch.float32).unsqueeze(1), shared, rounding_seeds, enabled)


NONE = Pending()


class Places(Factors):
    """Factors that stay in their places, while others come behind them. room: places to make when there are too few."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.room = 1
        self.held: list[Seed | None] = []  # whose factors are in each place
        self._views: dict[tuple[int, int], list[Views]] = {}

    def of(self, rows: int, count: int) -> list[Views]:
        if count > len(self.held) or self.now is None or self.now.scales.shape[0] != rows:
            self.held = [None] * max(count, self.room)
            self.made.clear()
            self._views.clear()
            self.now = self.made[rows, len(self.held)] = self._make(rows, len(self.held))
            for buffer in (self.now.buffer, *self.now.others, *(there for _, there in self.now.merged)):
                buffer.zero_()  # places that nothing is in are looked at too, where code is compiled
        end = count * self.rank
        if (rows, count) not in self._views:
            self._views[rows, count] = [(left[:end], right[:end], scale[:end]) for left, right, scale in self.now.views]
        return self._views[rows, count]

    def rescale(self, coefs: Tensor) -> None:
        super().rescale(coefs)
        assert self.now is not None
        self.now.scales[:, coefs.shape[1] :].zero_()

    def fill_places(self, seeds: Sequence[Seed], given: Tensor) -> None:
        """The factors of these seeds, `given` as a tensor, to the first places, where they are not there."""
        end = 0
        while end < len(seeds):
            begin = end
            while end < len(seeds) and not same_seed(self.held[end], seeds[end]):
                end += 1
            if end > begin:
                self.held[begin:end] = [None] * (end - begin)  # until it is done
                self.fill(given[begin:end], begin)
                self.held[begin:end] = seeds[begin:end]
            end += 1


class ForwardPending(Forward):
    """pending: what forwards see of earlier steps. room: how many seeds wait at most, 0 where that is not known."""

    factors_of = Places
    blocks = TogetherPending

    def __init__(self, *, proves: bool = True) -> None:
        super().__init__(proves=proves)
        self.pending = NONE
        self.room = 0
        self.fold: tuple[PassSpec, Tensor] | None = None  # how sums are rounded while nobody probes
        self._decays: dict[torch.device, Tensor] = {}  # float32 [R], where stand-ins look at it
        self._traced = [False]  # whether torch's compiler has looked at a stand-in

    def _stand_in(self, lower: Sweep) -> list[PlusLowRank]:
        made = super()._stand_in(lower)
        for one in made:
            one.traced = self._traced
        return made

    def _numbers(self, terms: Terms) -> PassNumbers:
        if not self.pending.steps:
            return super()._numbers(terms)
        rounding_seeds = None if self.fold is None else self.fold[1]
        return self.pending.numbers(self.eps, terms, rounding_seeds, None)

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        with self._presented(terms) if terms or self.pending.steps else contextlib.nullcontext():
            yield

    def _aim(self, numbers: PassNumbers) -> None:
        seeds, coefs = (*self.pending.seeds, *self.terms), numbers.coefs[:, 0]
        for device, factors in self.factors.items():
            assert isinstance(factors, Places)
            factors.room = max(self.room, len(seeds)) if self.room else 2 * len(seeds)
            views = factors.of(*coefs.shape)
            if self._traced[0]:  # compiled for all places once, and not for each number of them
                views = factors.of(len(coefs), len(factors.held))
            self._look_at(device, views)
            factors.rescale(coefs)
            factors.fill_places(seeds, numbers.seeds)
            self._show_decay(device, [self.stand_ins[i] for i in factors.at], factors.members, numbers.shared[:, 0])

    def _show_decay(
        self, device: torch.device, stand_ins: Sequence[PlusLowRank], members: Sequence[Member], decay: Tensor
    ) -> None:
        if self.pending.decays and (device not in self._decays or len(self._decays[device]) != len(decay)):
            self._decays[device] = torch.empty(len(decay), dtype=torch.float32, device=device)
        if self.pending.decays:
            self._decays[device].copy_(decay, non_blocking=device.type != "cpu")
        for one, m in zip(stand_ins, members, strict=True):
            one.decay = self._decays[device][m.row] if self.pending.decays else None

    # -------------------------------------------------------------------------------------------- probes in one forward

    def show_pending(self) -> bool:
        """Stand-ins show what waits and no probe. Whether anything waits."""
        self.terms = {}
        if self.pending.steps:
            self._aim(self.numbers_of(self.terms))
        return self.pending.steps > 0

    def numbers_of_block(self, seeds: Tensor, coefs: Tensor) -> PassNumbers:
        if not self.pending.steps:
            return super().numbers_of_block(seeds, coefs)
        waits = self.pending.numbers(self.eps, {})
        every = torch.cat([sent(waits.seeds, seeds.device), seeds])
        both = torch.cat([sent(waits.coefs, coefs.device), coefs], dim=2)
        return PassNumbers(every, both, waits.shared)

    @contextlib.contextmanager
    def present_together(self, probes: Sequence[Terms], rows: Rows) -> Iterator[None]:
        try:
            with super().present_together(probes, rows):
                yield
        finally:
            for i in self.written:
                self.stand_ins[i].full = None  # of what waits alone
            self.written.clear()

    # ------------------------------------------------------------------------------------------------ between the steps

    @contextlib.contextmanager
    def between(self, sweep: Sweep, fold: tuple[PassSpec, Tensor]) -> Iterator[None]:
        """Inside, between steps, the module is seen with what waits. Whatever needs a sum written out gets it as `fold`
        would round it: which arithmetic, and the seeds of its rounding."""
        proves, known = self.proves, (dict(self._copied), dict(self.copied))
        try:
            self.proves = False
            self.begin(sweep, torch.zeros(len(self.pending.decay), dtype=torch.float64, device=CPU), scaled=False)
            self.spec, self.fold = fold[0], fold
            with self.present({}):
                yield
        finally:
            self.fold, self.proves = None, proves
            self._copied, self.copied = known  # a look at values is no use in a closure
            self.latest = {}, self.eps, None
            self.end()

    def folded(self, member: Member, fold: tuple[PassSpec, Tensor], out: nn.Parameter) -> None:
        """A weight's values as `fold` would leave them, to `out`. Waits for the device."""
        numbers = self.pending.numbers(self.eps, {}, fold[1])
        if moves(numbers):
            self.passes.run(Sweep([member]), fold[0], numbers, out=[out], counted=False)
        else:
            out.copy_(member.param)

    def memory(self) -> list[Tensor]:
        return [*super().memory(), *self._decays.values()]


def rounded_by(seed: int, step: int, rounding: str, direction: Direction) -> tuple[PassSpec, Tensor]:
    """How a fold between steps rounds, after this step of the run with this seed: with the step's seeds, which no pass has
    used. rounding: the optimizer's setting."""
    seeds = [derive_seed(seed, step, stream) for stream in (ROUNDING_STREAM, STATE_STREAM)]
    spec = pass_spec(RULES["axpy"], direction, "nearest" if rounding == "nearest" else "stochastic")
    return spec, torch.tensor(seeds, dtype=torch.int64, device=CPU)


def moves(numbers: PassNumbers) -> bool:
    """Whether the pass changes anything: one that only adds 0 z would turn -0.0 into +0.0. Waits for the device."""
    return bool((numbers.coefs != 0).any()) or bool((numbers.shared != 1).any())

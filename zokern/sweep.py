"""Has passes done over the active parameters, and counts them: the only place where an optimizer touches memory."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zokern import backends
from zokern.contract.rules import Rule
from zokern.directions import Direction, rank
from zokern.passes import operators
from zokern.passes.operands import Operands
from zokern.passes.spec import MAX_CHAIN_SEEDS, MAX_PASS_SEEDS, MAX_STAGES, Chain, PassNumbers, PassSpec
from zokern.passes.table import Table

num_modes = torch._C._len_torch_dispatch_stack  # dispatch modes that are active
KEPT = 16  # kinds of passes over a sweep; a step has two or three


class Member(NamedTuple):
    """An active parameter: its tensor id, its row of the coefficients, its name for messages, its states by name.

    offset: global index of its first element, not 0 for a shard. stride: of a shard of a matrix along its last dimension,
    global distance between the starts of neighbouring rows: the size of a row of the whole matrix. 0 for others. shape: of
    the whole tensor where this is a shard, () where it is whole. dtensor: that `param` is this rank's part of, None where
    there is none.
    """

    param: Tensor
    tensor_id: int
    row: int
    name: str
    states: Mapping[str, Tensor] = {}
    offset: int = 0
    stride: int = 0
    shape: tuple[int, ...] = ()
    dtensor: Tensor | None = None

    @property
    def held(self) -> Tensor:
        """What a module and a parameter group have of it."""
        return self.param if self.dtensor is None else self.dtensor


@dataclass
class Counters:
    """What a run has done so far. A pass is one sweep over the active parameters, however many dtypes or devices."""

    steps: int = 0
    forwards: int = 0
    passes: int = 0
    launches: int = 0
    elements_moved: int = 0  # of weights, read or written: in place or not, two for each element of a pass


class Sweep(Sequence[Member]):
    """Members, sorted out once by device, and the operands of each kind of pass over them, made when first needed.

    Nothing about the tensors may change while it is used: their makers make another sweep then. absent: tensors that other
    ranks have all elements of; a pass over none but these is one all the same. gates: of blocks, where the device alone
    knows which ones a pass goes over; blocks: the members' places among these.
    """

    def __init__(
        self,
        members: Sequence[Member],
        absent: Sequence[Member] = (),
        gates: Tensor | None = None,
        blocks: Sequence[int] = (),
    ) -> None:
        self.members, self.absent, self.gates, self.blocks = members, absent, gates, blocks
        by_device: dict[torch.device, list[int]] = {}
        for i, member in enumerate(members):
            by_device.setdefault(member.param.device, []).append(i)
        self._by_device = list(by_device.values())
        self.numel = sum(m.param.numel() for m in members)
        self.params = [m.param for m in members]
        self.addresses = list(map(Tensor.data_ptr, self.params))
        self._operands: dict[object, tuple[object, list[Operands]]] = {}
        self._pieces: dict[int, tuple[Sequence[int], Sweep]] = {}

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> Member:  # type: ignore[override]
        return self.members[i]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    @functools.cached_property
    def layout(self) -> tuple[object, ...]:
        """What copies of the members depend on: which parameters, and what they are like."""
        every = (*self.members, *self.absent)
        return tuple((id(m.held), m.param.shape, m.param.dtype, m.param.device) for m in every)

    @functools.cached_property
    def left_out(self) -> Sweep:
        """The same members with gates of their own, for what these gates leave out."""
        assert self.gates is not None
        return Sweep(self.members, (), torch.zeros_like(self.gates), self.blocks)

    def piece(self, at: Sequence[int]) -> Sweep:
        """The members with these numbers: the same sweep for the same list."""
        if id(at) not in self._pieces:
            blocks = [self.blocks[i] for i in at] if self.blocks else ()
            self._pieces[id(at)] = at, Sweep([self.members[i] for i in at], (), self.gates, blocks)
        return self._pieces[id(at)][1]

    def forget(self) -> None:
        """Lets go of its operands: of copies whose memory is needed, of addresses that hold no more."""
        self._operands.clear()
        for _, piece in self._pieces.values():
            piece.forget()
        if "left_out" in vars(self):  # its gates are what a captured step works on
            self.left_out.forget()
        self._pieces.clear()

    def tables(self) -> list[Table]:
        """All that were found so far, for who must keep them: a captured graph reads them long after."""
        own = [operands.found for _, made in self._operands.values() for operands in made]
        pieces = [table for _, piece in self._pieces.values() for table in piece.tables()]
        others = self.left_out.tables() if "left_out" in vars(self) else []
        return [table for found in own if found is not None for table in found[2]] + pieces + others

    def operands(
        self,
        states: Sequence[str],
        out: Sequence[Tensor] | None = None,
        probes: Sequence[Tensor | None] = (),
        rank: int = 0,
    ) -> list[Operands]:
        """For each device. `out` and `probes` are held, so their ids mean no other lists. rank: of the directions."""
        key = tuple(states), id(out), id(probes), rank
        if key not in self._operands:
            if len(self._operands) == KEPT:
                del self._operands[next(iter(self._operands))]
            made = [self._on_one_device(at, states, out, probes, rank) for at in self._by_device]
            self._operands[key] = (out, probes), made
        return self._operands[key][1]

    def _on_one_device(
        self,
        at: list[int],
        states: Sequence[str],
        out: Sequence[Tensor] | None,
        probes: Sequence[Tensor | None],
        rank: int,
    ) -> Operands:
        members = [self.members[i] for i in at]
        return Operands(
            [m.param for m in members],
            None if out is None else [out[i] for i in at],
            [[m.states[name] for m in members] for name in states],
            [m.tensor_id for m in members],
            [m.offset for m in members],
            [m.row for m in members],
            [probes[i] for i in at] if probes else (),
            [m.stride for m in members] if any(m.stride for m in members) else (),
            rank,
            [m.shape or m.param.shape for m in members] if rank and any(m.shape for m in members) else (),
            self.gates,
            [self.blocks[i] for i in at] if self.blocks else (),
        )


NOTHING = Sweep(())


# ------------------------------------------------------------------------------------------------------- one launch


class _Here(threading.local):
    """tables: how many this thread's passes have gone over. A launch of one is done or was not."""

    def __init__(self) -> None:
        self.tables = [0]


_here = _Here()


def run(operands: Operands, spec: PassSpec, numbers: PassNumbers, backend: str = "auto") -> int:
    """One pass, with one row of coefs and shared a group; one launch for each dtype, whose number is returned.

    Tensors are checked when they are first seen; numbers are the caller's to check.

    Raises:
        ValueError: for more seeds or more elements than one launch takes.
    """
    if numbers.seeds.numel() > MAX_PASS_SEEDS:
        raise ValueError(
            f"a pass has {numbers.seeds.numel()} seeds, and one takes {MAX_PASS_SEEDS}: give them to several passes in turn"
        )
    # A compiler, a mode and the profiler see a call only if it goes through PyTorch's dispatcher.
    if torch.compiler.is_compiling() or num_modes() > 0 or torch.autograd.profiler._is_profiler_enabled:
        return operators.through_torch(operands, spec, numbers, backend)
    torch.autograd.graph.increment_version(operands.written)
    return launch(operands, spec, numbers, backend)


def launch(operands: Operands, spec: PassSpec, numbers: PassNumbers, backend: str, first: int = 0) -> int:
    """What `run` does, past PyTorch's dispatcher; autograd is not told. first: of the tables that are left."""
    found, wanted = operands.found, os.environ.get(backends.ENVIRONMENT, backend) if backend == "auto" else backend
    _, chosen, tables = found if found is not None and found[0] == wanted else _find(operands, backend, wanted)
    check_numbers(spec, numbers, tables)
    if chosen.near is not None:
        near = numbers.elsewhere.get((chosen, operands.device))
        if near is None:
            near = chosen.near(numbers, operands.device)
            if near is not numbers:
                numbers.elsewhere[chosen, operands.device] = near
        numbers = near
    reached = _here.tables
    for table in tables[first:] if first else tables:
        own = spec.dense if table.factors is None else spec
        if operands.gates is not None:
            table.open(operands.gates)
        chosen.run(table, own.exact if table.dtype == torch.float32 else own, numbers)
        reached[0] += 1
    return len(tables)


def check_numbers(spec: PassSpec, numbers: PassNumbers, tables: Sequence[Table]) -> None:
    """What a kernel reads by address must be there: it looks at no size. A journal's numbers come from a file.

    Raises:
        ValueError: for coefs and scalars without a row for each row of the tables, for states that the rule does not keep.
    """
    rule, rows = spec.rule, numbers.shared.shape[0]
    if numbers.checked is not rule:  # once for all pieces of a sweep
        fits = numbers.coefs.shape == (rows, len(rule.coefs), numbers.seeds.shape[0])
        if not fits or numbers.shared.shape != (rows, len(rule.scalars)):
            raise ValueError(
                f"a pass of {rule.name} with {numbers.seeds.shape[0]} seeds has coefs {tuple(numbers.coefs.shape)} and "
                f"scalars {tuple(numbers.shared.shape)}; it needs [rows, {len(rule.coefs)}, seeds] and "
                f"[rows, {len(rule.scalars)}]"
            )
        vars(numbers)["checked"] = rule
    for table in tables:
        if rows < table.groups:
            raise ValueError(f"a pass has numbers for {rows} rows, and its tensors are of {table.groups}")
        if rule.states and table.state_dtype is not torch.float32:
            _check_halves(rule, table.state_dtype)


def _check_halves(rule: Rule, dtype: torch.dtype) -> None:
    if str(dtype).removeprefix("torch.") not in rule.state_dtypes:
        raise ValueError(
            f"a pass of {rule.name} has states of {dtype}; it keeps them in {' or '.join(rule.state_dtypes)}"
        )


def _find(operands: Operands, backend: str, wanted: str) -> tuple[str, ModuleType, list[Table]]:
    """Kept with the operands: what was wanted, the backend, and what it reads."""
    operands.found = wanted, backends.choose(backend, operands.device), operands.tables()
    return operands.found


def run_chain(
    operands: Operands,
    stages: Sequence[tuple[PassSpec, PassNumbers]],
    rule: Rule,
    *,
    enabled: Tensor | None = None,
    backend: str = "auto",
    first: int = 0,
) -> int:
    """Several passes in place, one after another in registers (passes/spec.py's Chain): memory moves once.

    The operands' probes: the last stage, a perturbation, goes to these and not to the tensors. The bits are those of the
    passes done one by one. Returns the number of launches, one for each dtype.

    Raises:
        ValueError: unless there are 1 to 32 stages with at most 128 seeds in all; for more elements than a launch takes.
    """
    num_seeds = sum(numbers.seeds.numel() for _, numbers in stages)
    if not 1 <= len(stages) <= MAX_STAGES or num_seeds > MAX_CHAIN_SEEDS:
        raise ValueError(
            f"a chain has {len(stages)} stages with {num_seeds} seeds, and one takes 1 to {MAX_STAGES} stages with at most "
            f"{MAX_CHAIN_SEEDS}: make several chains of it, or passes (the bits are the same)"
        )
    found, wanted = operands.found, os.environ.get(backends.ENVIRONMENT, backend) if backend == "auto" else backend
    _, chosen, tables = found if found is not None and found[0] == wanted else _find(operands, backend, wanted)
    for spec, numbers in stages:
        check_numbers(spec, numbers, tables)
    if not first:
        torch.autograd.graph.increment_version(operands.written)
    reached = _here.tables
    for table in tables[first:] if first else tables:
        own = stages if table.factors is not None else [(spec.dense, numbers) for spec, numbers in stages]
        if table.dtype == torch.float32:
            own = [(spec.exact, numbers) for spec, numbers in own]
        if operands.gates is not None:
            table.open(operands.gates)
        chosen.run_chain(table, Chain(own, rule, bool(operands.probes), enabled))
        reached[0] += 1
    return len(tables)


operators.register(launch)


# ------------------------------------------------------------------------------------------------------ whole sweeps


class Listener(Protocol):
    """Is told of every pass that writes to the weights' own storage."""

    def __call__(self, spec: PassSpec, numbers: PassNumbers) -> None: ...


class _UnderWay(NamedTuple):
    """A pass that may break off. reached: of the thread that does it, and where it was before. launch: does what is left of
    one device's tables. told: what a listener is told of it."""

    reached: list[int]
    before: int
    operands: Sequence[Operands]
    launch: Callable[[Operands, int], int]
    told: Sequence[tuple[PassSpec, PassNumbers]]
    counted: int
    elements: int


@dataclass
class Passes:
    """direction: that of all passes. gate: int32 [1] on the device; a zero there makes every pass write
    nothing. It is kept here for placements, which give it to their passes as `enabled`. done: how many passes were; where
    one breaks off, `settle` makes sure that it was done or was not.
    """

    direction: Direction
    backend: str
    counters: Counters = field(default_factory=Counters)
    listener: Listener | None = None
    gate: Tensor | None = None
    done: int = 0
    under_way: _UnderWay | None = None

    def run(
        self,
        sweep: Sweep,
        spec: PassSpec,
        numbers: PassNumbers,
        *,
        out: Sequence[Tensor] | None = None,
        counted: bool = True,
    ) -> None:
        """One pass over every member, whose row of the coefficients and scalars is its own.

        counted False: a piece of a sweep that the caller counts.
        """
        if not sweep.members and not sweep.absent:
            self.done += 1
            return
        backend, every = self.backend, sweep.operands(spec.rule.states, out, rank=spec.rank)
        reached = _here.tables
        self.under_way, launches, before = None, 0, reached[0]
        try:
            for operands in every:
                launches += run(operands, spec, numbers, backend)
            self.done += 1
        except BaseException:
            self.under_way = _UnderWay(
                reached, before, every, lambda operands, first: launch(operands, spec, numbers, backend, first),
                [(spec, numbers)] if out is None else [], counted, 2 * sweep.numel,
            )  # fmt: skip
            raise
        if out is None and self.listener is not None:
            self.listener(spec, numbers)
        self.counters.launches += launches
        self.counters.passes += counted
        self.counters.elements_moved += 2 * sweep.numel

    def chain(
        self,
        sweep: Sweep,
        stages: Sequence[tuple[PassSpec, PassNumbers]],
        rule: Rule,
        *,
        probes: Sequence[Tensor | None] = (),
        enabled: Tensor | None = None,
    ) -> None:
        """Passes over the same members, one after another while an element is at hand: one sweep (run_chain).

        Each stage's rule is `rule` or the perturbation that goes with it. probes: the last stage, a perturbation, goes
        there instead, also where `enabled` leaves the others out.
        """
        go = functools.partial(run_chain, stages=stages, rule=rule, enabled=enabled, backend=self.backend)
        every, reached = sweep.operands(rule.states, probes=probes, rank=rank(self.direction)), _here.tables
        elements = 2 * sweep.numel + sum(probe.numel() for probe in probes if probe is not None)
        one = _UnderWay(
            reached, reached[0], every, lambda operands, first: go(operands, first=first),
            stages[:-1] if probes else stages, 1, elements,
        )  # fmt: skip
        self.under_way, launches = one, 0  # until it is noted
        for operands in every:
            launches += go(operands)
        self._note(one, launches)

    @property
    def begun(self) -> int:
        """Passes that were done, with one that has broken off after its first launch."""
        one = self.under_way
        return self.done + (one is not None and one.reached[0] != one.before)

    def settle(self) -> None:
        """Does what is left of a pass that broke off between two launches; one that broke off before them never was."""
        one = self.under_way
        if one is None:
            return
        done = one.reached[0] - one.before
        if done == 0:
            self.under_way = None
            return
        launches = 0
        for operands in one.operands:
            count = len(operands.tables())
            launches += count
            if done < count:
                one.launch(operands, done)
            done = max(done - count, 0)
        self._note(one, launches)

    def _note(self, one: _UnderWay, launches: int) -> None:
        self.under_way, self.done = None, self.done + 1
        if self.listener is not None:
            for spec, numbers in one.told:
                self.listener(spec, numbers)
        self.counters.launches += launches
        self.counters.passes += one.counted
        self.counters.elements_moved += one.elements

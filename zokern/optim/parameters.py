"""What an optimizer was given, as torch's parameter groups plus an id and a name for every tensor.

The tensor id decides which noise a parameter gets. For a module it is the position among all its parameters (tied ones
once), trainable or not, so that freezing or regrouping does not renumber; for anything else, the position in the order
given.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from zokern import _checks, deltas, parts
from zokern.contract.streams import matrices
from zokern.kinds import Number
from zokern.layers import RandomBlocks
from zokern.optim import reach, state
from zokern.optim.gates import Gated
from zokern.optim.numbers import NUMBERS, Rows
from zokern.placement import fsdp
from zokern.sweep import Member, Sweep

Groups = list[dict[str, Any]]


class Rate(Number):
    """A number of a parameter group, kept as it is: a tensor may stand for it, and one on a device is not read."""

    def check(self, value: Any, name: str) -> Any:
        if not (isinstance(value, Tensor) and value.device.type != "cpu"):
            super().check(value, name)
        return value


MOST = _checks.MAX_FLOAT32  # passes read float32
RATES = {"lr": Rate(0.0, MOST), "eps": Rate(0.0, MOST, open_low=True), "weight_decay": Rate(0.0, MOST)}


class Registry:
    """Ids and names by parameter; new parameters (add_param_group) get the module's id, or the next free one."""

    def __init__(self, module: nn.Module | None) -> None:
        self.ids: dict[int, int] = {}
        self.names: dict[int, str] = {}
        self._taken: set[str] = set()  # the same names, to find one at once
        self._keep: list[Tensor] = []  # an id() is only valid while its object lives
        if module is not None:
            for name, p in module.named_parameters():
                self.add(p, name)

    def add(self, p: Tensor, name: str | None = None) -> None:
        if id(p) not in self.ids:
            if name is not None and name in self._taken:
                raise ValueError(f"params: two parameters are called {name!r}; give each a name of its own")
            number = max(self.ids.values(), default=-1) + 1
            name = name or f"parameter {number}"
            self._keep.append(p)
            self._taken.add(name)
            self.names[id(p)] = name
            self.ids[id(p)] = number  # last: who has one has the rest

    def keep(self, known: Iterable[int]) -> None:
        """Forgets all but those parameters, by their id()."""
        for one in self.ids.keys() - set(known):
            self._taken.discard(self.names.pop(one))
            del self.ids[one]
        self._keep = [p for p in self._keep if id(p) in self.ids]

    def replace(self, p: Tensor, name: str) -> None:
        """For a parameter that has taken the place of the one of this name, and has its id."""
        for other, own in list(self.names.items()):
            if own == name:
                self.ids[id(p)], self.names[id(p)] = self.ids.pop(other), self.names.pop(other)
                self._keep.append(p)
                return
        self.add(p, name)

    def adopt(self, p: Tensor, name: str) -> None:
        """As `add`, for a parameter that has come to have this name in the module: one that had it gives it away."""
        if id(p) not in self.ids and name in self._taken:
            for other, own in self.names.items():
                if own == name:
                    self.names[other] = f"{name} (replaced, tensor id {self.ids[other]})"
                    self._taken.add(self.names[other])
            self._taken.discard(name)
        self.add(p, name)


def parse(params: object, shown: nn.Module | None = None) -> tuple[Groups, nn.Module | None, Registry]:
    """Groups for torch.optim.Optimizer from a module, or from what torch's optimizers take. shown: the module whose
    parameters those are, which then have its names and ids."""
    for module in (params, shown):
        if isinstance(module, nn.Module):
            fsdp.refuse_flat(module)
            fsdp.let_go(fsdp.modules_of(module))  # a root has other parameters after a forward
    if isinstance(params, nn.Module):
        if shown is not None and shown is not params:
            raise ValueError("params and module are two modules; give one, or groups of the parameters of `module`")
        registry = Registry(params)
        trainable = [p for p in params.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(f"params: {type(params).__name__} has no parameter with requires_grad=True")
        return [{"params": trainable}], params, registry
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an nn.Module or an iterable of tensors, named tensors or groups; got one Tensor"
        )
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an nn.Module or an iterable, got {type(params).__name__}")
    given = list(params)
    if not given:
        raise ValueError("params is empty: there is nothing to optimise")
    registry = Registry(shown)
    groups: Groups = [dict(g) for g in given] if isinstance(given[0], dict) else [{"params": given}]
    for g, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"params: group {g} has no 'params' entry")
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        named = [e if isinstance(e, tuple) else (None, e) for e in entries]
        for name, p in named:
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"params: group {g} has a {type(p).__name__}; tensors or (name, tensor) pairs are needed"
                )
            if shown is not None and id(p) not in registry.ids:
                raise ValueError(
                    f"params: group {g} has a {'tensor' if name is None else repr(name)} of shape {tuple(p.shape)} "
                    "that is no "
                    f"parameter of module, a {type(shown).__name__}; leave module= out, or give the module that has it"
                )
            registry.add(p, name)
        group["params"] = [p for _, p in named]
    fsdp.refuse_alone((p for group in groups for p in group["params"]), shown)
    return groups, shown, registry


def refuse_frozen(groups: Groups) -> None:
    """Groups with nothing to train."""
    every = [p for group in groups for p in group["params"]]
    if not any(p.requires_grad for p in every):
        raise ValueError(
            f"params: none of the {len(every)} tensors has requires_grad=True, so nothing would be trained; call "
            "requires_grad_() on what is to be"
        )


def refuse_without_matrix(groups: Groups, rank: int, placement: str) -> None:
    """Directions of low rank of groups that have nothing but dense noise."""
    every = [tuple(p.shape) for group in groups for p in group["params"] if p.requires_grad]
    if rank and not any(matrices(shape, rank) for shape in every):
        sides = max((min(shape[-2:]) for shape in every if len(shape) in (2, 3)), default=0)
        dense = "use distribution='normal'" + (", and another placement" if placement == "forward" else "")
        raise ValueError(
            f"distribution is LowRank({rank}), and none of the {len(every)} tensors to be trained is a matrix whose "
            "smaller side is above the rank, so all would take dense noise; "
            + (f"the largest smaller side is {sides}: take a rank below" if sides > 1 else dense)
        )


def check_parameter(p: Tensor, name: str) -> None:
    """Zero-size parameters are allowed here (they are skipped); everything else as for a pass."""
    if isinstance(p, deltas.Delta):
        return
    p = parts.part(p, name).local
    if type(p).__name__ == "FlatParameter":
        raise TypeError(
            f"{name} is a FlatParameter of FullyShardedDataParallel (FSDP1), which lays all tensors of a module end to "
            "end: shard the model with torch.distributed.fsdp.fully_shard (FSDP2), which keeps each"
        )
    if type(p).__name__ == "FakeTensor":
        raise TypeError(
            f"{name} is a FakeTensor, which has a shape and no numbers; make the model outside FakeTensorMode"
        )
    if p.numel() or p.dtype not in _checks.DTYPES or p.device.type == "meta":
        _checks.check_tensor(p, name)


def check_group(group: dict[str, Any], index: int) -> None:
    """An array of one number becomes that number."""
    where = f" of group {index}" if index else ""
    for key, kind in RATES.items():
        if key in group:
            kind.check(group[key], key + where)
            if isinstance(group[key], np.ndarray):
                group[key] = group[key].item()
    if RATES.keys() <= group.keys():
        reach.check_group(group, where)


@dataclass(frozen=True)
class Active:
    """What a step moves: its members, the rows of their numbers, and the numbers of the blocks that it leaves out.

    sizes: of the rows, in elements of whole tensors. On a rank that has no element of a tensor, it is no member. ends: the
    first and the last tensor, as modules hold them. gated: where the device alone knows which blocks are left out.
    """

    sweep: Sweep
    rows: Rows
    dropped: frozenset[int]
    sizes: tuple[int, ...] = ()
    gated: Gated | None = None
    ends: tuple[Tensor, ...] = ()


def _gates(active: Active) -> Tensor | None:
    return None if active.gated is None else active.gated.gates


def _place(layers: RandomBlocks, member: Member) -> int:
    """Of a member's block among the gates."""
    block = layers.block_of(member.held)
    return len(layers.names) if block is None else block


class Owner(Protocol):
    """The optimizer. Asked each time, and not held: its lists are replaced by loads and by users, and a module that hangs
    in a circle is freed late."""

    param_groups: Groups
    state: Any
    layers: RandomBlocks | None
    pipelined: bool

    def row_key(self, param: Tensor) -> Hashable:
        """Parameters of one group whose keys differ get rows of numbers of their own."""

    def check_writable(self, param: Tensor) -> None:
        """Refuses one that its updates cannot be added to."""


class Parameters:
    """The parameters of an optimizer: looked at in each step, because users replace them, and sorted out when they differ.

    spec: the states that the method keeps.
    """

    def __init__(self, registry: Registry, spec: state.Spec) -> None:
        self.registry, self.spec = registry, spec
        self._seen: list[object] = []
        self._active: Active | None = None
        self._layout: dict[str, Any] | None = None
        self._checked: list[object] = []
        self.version = 0  # another one where parameters have changed
        self.looked = 0  # how often the groups' numbers were new

    def look_again(self) -> None:
        """What was seen at the beginning of a step is no longer so."""
        self._seen = []

    def forget(self) -> None:
        """Nothing is held any longer: states are among what it holds, which a load replaces."""
        self._seen, self._active, self._layout = [], None, None

    def check_groups(self, owner: Owner, pipelined: bool) -> None:
        """The groups' numbers, which users and schedulers change."""
        given: list[object] = []
        for group in owner.param_groups:
            given += group["lr"], group["eps"], group["weight_decay"]
        if NUMBERS.issuperset(map(type, given)) and given == self._checked:
            return
        for g, group in enumerate(owner.param_groups):
            check_group(group, g)
            if pipelined and isinstance(group["eps"], Tensor):
                raise TypeError(f"eps of parameter group {g} is a tensor; pipelined=True needs a number")
        self._checked = given if NUMBERS.issuperset(map(type, given)) else []
        self.looked += 1

    def active(self, owner: Owner, run_seed: int, step: int, gates: Tensor | None = None) -> Active:
        """What `step` moves; the same object for as long as nothing about it changes. gates: all of it that they let
        through."""
        layers = owner.layers
        dropped = frozenset(() if layers is None or gates is not None else layers.dropped(run_seed, step))
        seen = self._look(owner)
        changed = seen != self._seen
        if changed:
            self._layout, self._checked = None, []
            self.version += 1
            self.check_groups(owner, owner.pipelined)  # what eps may be depends on the weights' type
        kept = self._active
        if changed or kept is None or kept.dropped != dropped or _gates(kept) is not gates:
            members, sizes = self._members(owner, dropped, changed)
            here = [m for m in members if m.param.numel()]
            absent = [m for m in members if not m.param.numel()]
            ends = tuple(m.held for m in (members[0], members[-1])) if members else ()
            sweep, gated = Sweep(here, absent), None
            if gates is not None and layers is not None:
                sweep = Sweep(here, absent, gates, [_place(layers, m) for m in here])
                gated = Gated.of(gates, members, [_place(layers, m) for m in members])
            kept = self._active = Active(sweep, list(sizes), dropped, tuple(sizes.values()), gated, ends)
            self._seen = self._look(owner) if self.spec else seen  # anew: states may have been made
        return kept

    def _look(self, owner: Owner) -> list[object]:
        """Differs as soon as a parameter or a state is another one, elsewhere, or like something else."""
        seen: list[object] = [id(owner.layers)]
        for group in owner.param_groups:
            for p in group["params"]:
                mine = p if type(p) is nn.Parameter else parts.local(p)
                seen.append((id(p), p.requires_grad, id(mine), mine.data_ptr(), mine.shape, mine.stride(), p.dtype))
                if self.spec and p in owner.state:
                    own = owner.state[p]
                    kept = [
                        t if type(t) is Tensor else parts.local(t) for t in map(own.get, self.spec) if t is not None
                    ]
                    seen += [(id(t), t.data_ptr(), t.shape, t.stride(), t.dtype) for t in kept]
            seen.append(len(group["params"]))
        return seen

    def trainable(self, owner: Owner) -> Iterator[tuple[int, Tensor]]:
        """Each parameter that has something to train, once, with the number of its group; all are registered."""
        found: set[int] = set()
        for g, group in enumerate(owner.param_groups):
            for p in group["params"]:
                if p.requires_grad and p.numel() and id(p) not in found:
                    found.add(id(p))
                    self.registry.add(p)
                    yield g, p

    def _members(
        self, owner: Owner, dropped: frozenset[int], changed: bool
    ) -> tuple[list[Member], dict[tuple[int, Hashable], int]]:
        """And the sizes of their rows. changed: something is not as it was, so that all are looked at again: model.double()
        may have come between."""
        members: list[Member] = []
        rows: dict[tuple[int, Hashable], int] = {}
        sizes: dict[tuple[int, Hashable], int] = {}
        for g, p in self.trainable(owner):
            if owner.layers is not None and not owner.layers.is_active(p, dropped):
                continue
            if changed or type(p) is not nn.Parameter:  # put into a group by somebody else
                check_parameter(p, f"params: {self.registry.names[id(p)]}")
                owner.check_writable(p)
            key = g, owner.row_key(p)
            row, name = rows.setdefault(key, len(rows)), self.registry.names[id(p)]
            sizes[key] = sizes.get(key, 0) + p.numel()
            kept = state.of(owner.state, p, self.spec)
            mine = parts.part(p, f"params: {name}")
            if mine.local is p:
                members.append(Member(p, self.registry.ids[id(p)], row, name, kept))
            else:
                kept = {one: parts.local(t) for one, t in kept.items()}
                members.append(Member(mine.local, self.registry.ids[id(p)], row, name, kept, *mine[1:], dtensor=p))
        return members, sizes

    def layout(self, owner: Owner, *, anew: bool = False) -> dict[str, Any]:
        """What a replay has to know: ids, shapes, dtypes, groups, rows and blocks. anew: as they are, not as a step saw
        them when it began."""
        if self._layout is None or (anew and self._look(owner) != self._seen):
            params = [
                [
                    self.registry.ids[id(p)], self.registry.names[id(p)], list(p.shape),
                    str(p.dtype).removeprefix("torch."), g, owner.row_key(p),
                    None if owner.layers is None else owner.layers.block_of(p),
                ]
                for g, p in self.trainable(owner)
            ]  # fmt: skip
            layers = None if owner.layers is None else [owner.layers.num_dropped, len(owner.layers.names)]
            self._layout = {"params": params, "layers": layers}
        return self._layout

    def ids(self, owner: Owner) -> list[list[int]]:
        return [[self.registry.ids[id(p)] for p in group["params"]] for group in owner.param_groups]

    def names(self, owner: Owner) -> list[list[str]]:
        return [[self.registry.names[id(p)] for p in group["params"]] for group in owner.param_groups]

    def take_ids(self, owner: Owner, ids: Sequence[Sequence[int]]) -> None:
        """Those of a saved run."""
        for group, own in zip(owner.param_groups, ids, strict=True):
            for p, tensor_id in zip(group["params"], own, strict=True):
                self.registry.ids[id(p)] = tensor_id
        self.forget()

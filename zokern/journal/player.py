"""Applies the steps of a journal to parameters by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zokern import deltas, directions, parts
from zokern.contract.rules import RULES, Rule
from zokern.contract.streams import ROUNDING_STREAM, STATE_STREAM, derive_seed
from zokern.journal.format import BROKEN_OFF, JournalError
from zokern.journal.reader import Reader, Step
from zokern.layers import draw
from zokern.passes.spec import MAX_CHAIN_SEEDS, MAX_STAGES, PassNumbers, PassSpec, rule_of_probes
from zokern.placement.pending import NONE, moves, rounded_by
from zokern.sweep import Member, Passes, Sweep

States = Callable[[Tensor, str], Tensor]  # the state of a parameter by name, made when it is first asked for


Chosen = list[tuple[Tensor, int, int, str]]  # parameters with their ids, rows and names
_KEPT = 64


class Player:
    """Applies the steps of a journal to parameters by their names. `flush` does what is still waiting.

    No forward needs the weights in between, so passes over the same parameters wait for each other and are then done as
    one chain (passes/spec.py): each element is read once, takes up to 32 passes with the rounding of each, and is
    written once.
    """

    def __init__(self, reader: Reader, params: Mapping[str, Tensor], states: States, backend: str = "auto") -> None:
        self.reader, self.params, self.states = reader, params, states
        self.passes = Passes(directions.parse(reader.header["distribution"]), backend)
        self.seed = int(reader.header["seed"])
        self.members: list[Member] = []
        self.waiting: list[tuple[PassSpec, PassNumbers]] = []
        self.pending = NONE  # updates that wait, of the parameters `of`
        self.of: list[Member] = []
        self.last = 0  # the step that was played last
        self.checked: object = None  # the layout that was last looked at
        self._parts: dict[int, parts.Part] = {}  # by the parameter's id
        self._chosen: dict[tuple[int, frozenset[int]], tuple[Any, Chosen, int]] = {}

    def flush(self) -> None:
        """The passes that wait."""
        waiting, self.waiting = self.waiting, []
        if len(waiting) == 1:
            self.passes.run(Sweep(self.members), *waiting[0])
        elif waiting:
            rule = _rule_of({spec.rule for spec, _ in waiting})
            assert rule is not None
            self.passes.chain(Sweep(self.members), waiting, rule)

    def _wait(self, members: list[Member], told: tuple[PassSpec, PassNumbers]) -> None:
        if not members:
            return
        own = [[(m.name, m.row, m.tensor_id) for m in of] for of in (self.members, members)]
        seeds = sum(numbers.seeds.numel() for _, numbers in [*self.waiting, told])
        fits = len(self.waiting) < MAX_STAGES and seeds <= MAX_CHAIN_SEEDS
        if not (own[0] == own[1] and fits and _rule_of({spec.rule for spec, _ in [*self.waiting, told]})):
            self.flush()
        if not self.waiting:  # a rule that comes later may have states that the members so far have not
            self.members = members
        self.members = [
            old._replace(states={**old.states, **new.states}) for old, new in zip(self.members, members, strict=True)
        ]
        last = self.waiting[-1] if self.waiting else None
        if last is not None and self._one_pass(last, told):
            (spec, first), (_, second) = last, told
            seeds_of_both = torch.cat([first.seeds, second.seeds])
            coefs = torch.cat([first.coefs, second.coefs], dim=2)
            self.waiting[-1] = spec, replace(first, seeds=seeds_of_both, coefs=coefs, elsewhere={})
        else:
            self.waiting.append(told)

    def _one_pass(self, first: tuple[PassSpec, PassNumbers], second: tuple[PassSpec, PassNumbers]) -> bool:
        """Where nothing is rounded or scaled between two passes, their fused multiply-adds are those of one."""
        exact = all(m.param.dtype == torch.float32 for m in self.members)
        axpy = first[0].rule.name == second[0].rule.name == "axpy"
        return exact and axpy and bool((second[1].shared == 1).all())

    def play(self, step: Step) -> set[int]:
        """One step; returns the blocks that it left out."""
        dropped, chosen, _ = self.active(step)
        self._passes_of(step, chosen)
        if not step.flags & BROKEN_OFF:
            self._keep(step, chosen)
        return dropped

    def _keep(self, step: Step, chosen: Chosen) -> None:
        """What waits after a step: all steps between two folds have an update that does."""
        updates, self.last = self.deferred(step), step.number
        if not updates:
            self.pending = NONE
            return
        for one in updates:
            self.pending = self.pending.after(one, decays=True)
        self.of = self._members(chosen, ())

    def fold(self) -> None:
        """Adds what waits, as the optimizer's fold() after the last step would have."""
        self.flush()
        deltas.refuse_fold(self.of)
        rounding = self.reader.header["options"].get("rounding", "auto")
        spec, seeds = rounded_by(self.seed, self.last, rounding, self.passes.direction)
        numbers = self.pending.numbers(self.pending.decay, {}, seeds)
        if self.pending.steps and moves(numbers):
            self.passes.run(Sweep(self.of), spec, numbers)
        self.pending = NONE

    def active(self, step: Step) -> tuple[set[int], Chosen, int]:
        """The blocks that a step left out; its parameters; the number of their rows.

        Raises:
            JournalError: for a parameter that the model does not have, or has another shape or dtype of.
        """
        layers = step.layout["layers"]
        dropped = draw(self.seed, step.number, *layers) if layers is not None else set()
        key = id(step.layout), frozenset(dropped)
        if key not in self._chosen:
            if len(self._chosen) == _KEPT:
                self._chosen.clear()
            self._chosen[key] = step.layout, *self._choose(step.layout, dropped)
        return dropped, *self._chosen[key][1:]

    def _choose(self, layout: Mapping[str, Any], dropped: set[int]) -> tuple[Chosen, int]:
        chosen: Chosen = []
        rows: dict[tuple[int, Any], int] = {}
        for tensor_id, name, shape, dtype, group, key, block in layout["params"]:
            if block in dropped and block is not None:
                continue
            if name not in self.params:
                raise JournalError(
                    f"{self.reader.path}: it moves the parameter {name!r}, which the model does not have; give the model "
                    "that was trained, with its adapter. What the run added later is needed from the beginning: "
                    "add_param_group before resume, all tensors for replay"
                )
            p = self.params[name]
            here = list(p.shape), str(p.dtype).removeprefix("torch.")
            if here != (shape, dtype):
                told = f"{name!r} is {shape} {dtype} there, and {here[0]} {here[1]} in the model"
                raise JournalError(f"{self.reader.path}: {told}")
            chosen.append((p, tensor_id, rows.setdefault((group, key), len(rows)), name))
        return chosen, len(rows)

    def deferred(self, step: Step) -> list[PassNumbers]:
        """The updates of a step that wait."""
        return [numbers for one, _, numbers in self._told(step) if one.get("deferred")]

    def _passes_of(self, step: Step, chosen: Chosen) -> None:
        for one, spec, numbers in self._told(step):
            if not one.get("deferred"):
                self._wait(self._members(chosen, spec.rule.states), (spec, numbers))

    def _members(self, chosen: Chosen, kept: Sequence[str]) -> list[Member]:
        """Of what this rank has elements of."""
        members: list[Member] = []
        for p, i, row, name in chosen:
            if id(p) not in self._parts:
                self._parts[id(p)] = parts.part(p, name)
            part = self._parts[id(p)]
            if part.local.numel():
                states = {s: parts.local(self.states(p, s)) for s in kept}
                members.append(Member(part.local, i, row, name, states, *part[1:]))
        return members

    def _told(self, step: Step) -> Iterator[tuple[dict[str, Any], PassSpec, PassNumbers]]:
        """The passes of a step, each as its signature has it, and what it was told."""
        at = 0
        for one in step.signature["passes"]:
            rule = RULES[one["rule"]]
            seeds = [derive_seed(self.seed, step.number - age, k) for age, k in one["seeds"]]
            shape = one["rows"], len(rule.coefs), len(seeds)
            coefs, at = _take(step.frame, at, shape)
            shared, at = _take(step.frame, at, (one["rows"], len(rule.scalars)))
            rounding = (
                derive_seed(self.seed, step.number, ROUNDING_STREAM),
                derive_seed(self.seed, step.number, STATE_STREAM),
            )
            spec = PassSpec(
                rule,
                self.passes.direction,
                "stochastic" if one.get("stochastic", False) else "nearest",
                one.get("square_of_sum", False),
                one.get("keep_second", False),
            )
            told = torch.tensor(rounding, dtype=torch.int64, device="cpu") if one.get("rounded") else None
            seeds_of = torch.tensor(seeds, dtype=torch.int64, device="cpu")
            yield one, spec, PassNumbers(seeds_of, coefs, shared, told)


def _rule_of(rules: set[Rule]) -> Rule | None:
    """The rule of a chain with stages of these rules, None where no chain has them all."""
    if {rule.name for rule in rules} == {"scaled_axpy"}:
        return RULES["hizoo"]
    candidates = [rule for rule in rules if rule.name != "scaled_axpy" and rules <= {rule, rule_of_probes(rule)}]
    return candidates[0] if candidates else None


def _take(frame: np.ndarray[Any, Any], at: int, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    end = at + int(np.prod(shape))
    return torch.from_numpy(frame[at:end].reshape(shape).copy()), end


def memory_of(step: Step) -> list[float]:
    """What the method remembered of a step."""
    count, groups = step.signature["memory"], step.signature["groups"]
    end = len(step.frame) - groups - 1
    values: list[float] = step.frame[end - 2 * count : end].copy().view(np.float64).tolist()
    return values


def fresh_states(header: Mapping[str, Any]) -> States:
    """States as they are at a run's beginning, by parameter and name."""
    made: dict[tuple[int, str], Tensor] = {}

    def of(p: Tensor, name: str) -> Tensor:
        dtype, initial = header["states"][name]
        key = id(p), name
        if key not in made:
            made[key] = torch.full(parts.local(p).shape, float(initial), dtype=getattr(torch, dtype), device=p.device)
        return made[key]

    return of

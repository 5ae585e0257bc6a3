"""Does a run's passes again on the weights that it started from: the same bits as training gave, without a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zokern import directions
from zokern.contract.rules import RULES, Rule
from zokern.contract.streams import ROUNDING_STREAM, STATE_STREAM, derive_seed
from zokern.journal.format import BROKEN_OFF, JournalError, Reader, Step
from zokern.journal.hashing import hash_of
from zokern.layers import draw
from zokern.passes.spec import MAX_CHAIN_SEEDS, MAX_STAGES, PassNumbers, PassSpec, rule_of_probes
from zokern.sweep import Member, Passes, Sweep

States = Callable[[Tensor, str], Tensor]  # the state of a parameter by name, made when it is first asked for


MAX_EMPTY_BLOCKS = 1 << 16
REQUIRED = ("contract", "method", "options", "distribution", "placement", "seed", "first_step", "states", "base")


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
        same = [(m.name, m.row) for m in self.members] == [(m.name, m.row) for m in members]
        seeds = sum(numbers.seeds.numel() for _, numbers in [*self.waiting, told])
        fits = len(self.waiting) < MAX_STAGES and seeds <= MAX_CHAIN_SEEDS
        if not (same and fits and _rule_of({spec.rule for spec, _ in [*self.waiting, told]})):
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
        dropped, chosen = self.active(step)
        self._passes_of(step, chosen)
        return dropped

    def active(self, step: Step) -> tuple[set[int], list[tuple[Tensor, int, int, str]]]:
        """The blocks that a step left out; its parameters with their ids, rows and names."""
        layers = step.layout["layers"]
        if layers is not None and not 0 <= layers[0] <= layers[1] <= len(step.layout["params"]) + MAX_EMPTY_BLOCKS:
            raise JournalError(f"{self.reader.path}: {layers[0]} of {layers[1]} blocks are left out, which cannot be")
        dropped = draw(self.seed, step.number, *layers) if layers is not None else set()
        chosen: list[tuple[Tensor, int, int, str]] = []
        rows: dict[tuple[int, Any], int] = {}
        for tensor_id, name, shape, dtype, group, key, block in step.layout["params"]:
            if block in dropped and block is not None:
                continue
            if name not in self.params:
                raise JournalError(
                    f"{self.reader.path}: it moves the parameter {name!r}, which the model does not have"
                )
            p = self.params[name]
            if list(p.shape) != shape or str(p.dtype).removeprefix("torch.") != dtype:
                raise JournalError(
                    f"{self.reader.path}: {name} is {shape} {dtype} there, and {list(p.shape)} {p.dtype} in the model"
                )
            chosen.append((p, tensor_id, rows.setdefault((group, key), len(rows)), name))
        return dropped, chosen

    def _passes_of(self, step: Step, chosen: list[tuple[Tensor, int, int, str]]) -> None:
        at = 0
        for one in step.signature["passes"]:
            rule = RULES[one["rule"]]
            seeds = [derive_seed(self.seed, step.number - age, k) for age, k in one["seeds"]]
            shape = one["rows"], len(rule.coefs), len(seeds)
            coefs, at = _take(step.frame, at, shape)
            shared, at = _take(step.frame, at, (one["rows"], len(rule.scalars)))
            members = [
                Member(p, i, row, name, {s: self.states(p, s) for s in rule.states}) for p, i, row, name in chosen
            ]
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
            self._wait(
                members, (spec, PassNumbers(torch.tensor(seeds, dtype=torch.int64, device="cpu"), coefs, shared, told))
            )


def _rule_of(rules: set[Rule]) -> Rule | None:
    """The rule of a chain with stages of these rules, None where no chain has them all."""
    if {rule.name for rule in rules} == {"scaled_axpy"}:
        return RULES["hizoo"]
    candidates = [rule for rule in rules if rule.name != "scaled_axpy" and rules <= {rule, rule_of_probes(rule)}]
    return candidates[0] if candidates else None


def check(path: Path, params: Mapping[str, Tensor], until: int | None = None) -> None:
    """Reads the whole journal, so that what is wrong with it is known before anything is changed."""
    reader = Reader(path)
    missing = [name for name in REQUIRED if name not in reader.header]
    if missing:
        raise JournalError(f"{path}: its header has no {missing[0]!r}; take another copy of it")
    done, layout = int(reader.header["first_step"]), None
    if until is not None and until < done:
        raise JournalError(f"until is {until}, and the journal starts at step {done}")
    try:
        player = Player(reader, params, lambda p, name: p)
        for step in reader.steps():
            if until is not None and step.number >= until:
                return
            if step.layout is not layout:
                player.active(step)
                layout = step.layout
            numbers = sum(
                one["rows"] * (len(RULES[one["rule"]].coefs) * len(one["seeds"]) + len(RULES[one["rule"]].scalars))
                for one in step.signature["passes"]
            )
            if numbers + 2 * step.signature["memory"] + step.signature["groups"] + 1 != len(step.frame):
                raise JournalError(f"{path}: the numbers of step {step.number} do not fit its passes")
            if not step.flags & BROKEN_OFF:
                done = step.number + 1
    except JournalError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise JournalError(
            f"{path}: a layout or a signature is malformed ({error!r}); take another copy of it"
        ) from error
    if until is not None and until > done:
        raise JournalError(f"until is {until}, and the journal ends after {done} steps")


def _take(frame: np.ndarray[Any, Any], at: int, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    end = at + int(np.prod(shape))
    return torch.from_numpy(frame[at:end].reshape(shape).copy()), end


def memory_of(step: Step) -> list[float]:
    """What the method remembered of a step."""
    count, groups = step.signature["memory"], step.signature["groups"]
    end = len(step.frame) - groups - 1
    values: list[float] = step.frame[end - 2 * count : end].copy().view(np.float64).tolist()
    return values


def named(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name; of a module, tied ones under their first name."""
    return dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)


def fresh_states(header: Mapping[str, Any]) -> States:
    """States as they are at a run's beginning, by parameter and name."""
    made: dict[tuple[int, str], Tensor] = {}

    def of(p: Tensor, name: str) -> Tensor:
        dtype, initial = header["states"][name]
        key = id(p), name
        if key not in made:
            made[key] = torch.full(p.shape, initial, dtype=getattr(torch, dtype), device=p.device)
        return made[key]

    return of


@torch.no_grad()
def replay(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    *,
    until: int | None = None,
    verify: bool = True,
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> int:
    """Makes the tuned weights of a journal's run out of those it started from, in place.

    Args:
        path: the journal.
        model: with the weights that the run started from, as a module or as tensors by name; on any device.
        until: how many of the run's steps to do; None for all.
        verify: compare the weights with the hashes in the journal, before the first step and at its marks.
        backend: as for the optimizers; all give the same bits.
        progress: called with the number of steps done, after each.

    Returns:
        The number of steps done.

    Raises:
        JournalError: if the journal is damaged, the weights are not those it starts from, or the result is not what
            training had. Weights are changed in the last case only.
    """
    reader, params = Reader(Path(path)), named(model)
    check(Path(path), params, until)
    if verify and hash_of(params.items()) != reader.header["base"]:
        raise JournalError(f"{path}: the weights given are not those that the run started from; give its base model")
    player = Player(reader, params, fresh_states(reader.header), backend)
    done = int(reader.header["first_step"])
    for step in reader.steps():
        if until is not None and step.number >= until:
            break
        player.play(step)
        if not step.flags & BROKEN_OFF:
            done = step.number + 1
        if progress is not None:
            progress(done)
    player.flush()
    for mark in reader.marks if verify else []:
        if mark.get("step") == done and hash_of(params.items()) != mark.get("hash"):
            raise JournalError(f"{path}: the weights after {done} steps are not those that training had")
    return done

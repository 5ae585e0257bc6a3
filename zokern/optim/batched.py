"""All probes of a round in one forward: `step(closure, batches, batched=True)`.

Block k of a repeated batch's rows sees probe k. Whether a model and a closure keep the rows apart is tested before it is
relied on, once for each kind of module, mode, batch and number of blocks: the probes are evaluated one after another, then
together, and again together with the signs of some blocks' directions changed, so chosen that each block has its own
pattern of changes. Losses of blocks with an unchanged direction must keep every bit, and each block's must be that of its
probe alone, within rounding. Where one is not so, probes are evaluated one after another from then on, which is said once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zokern.optim import repeating
from zokern.optim.examples import PerExample
from zokern.optim.pairing import Draws, Generators
from zokern.optim.probing import Probing
from zokern.passes.update import Terms
from zokern.placement.forward import Forward
from zokern.placement.rows import NotInBlocks, Rows

FACTORS = (-1.0, -30.0)  # of a direction that is changed; the second where the first changes no loss
SHARE = 0.05  # of the losses' spread over the probes that rounding may make
ROUNDING = 1e-5  # of the losses' size, for float32
HALF_ROUNDING = 3e-2  # for 16-bit weights or losses
MIXED = "the model or the closure mixes the rows of a batch, as packing, routed experts and batch norms do"
OTHERWISE = ", or the closure does not return the same twice (a counter, random numbers that are not torch's)"
ROUNDED = ", or the loss jumps where 16 bits round otherwise, as rewards of greedy texts do"
OUT = (torch.OutOfMemoryError, MemoryError)


@dataclass
class Kind:
    """What was found of one kind of forward. kinds: Rows'. why_not: it cannot be done, and why. open: no loss has reacted
    to any direction yet."""

    kinds: dict[Hashable, set[bool]] = field(default_factory=dict)
    why_not: str = ""
    open: bool = False


class Batched:
    """Of one optimizer: the kinds of forwards that it has tested. testing: a forward is under way that is a test, and no
    probe's."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Kind] = {}
        self.testing = False
        self.tree: object = None
        self.told = False

    def begin(self, owner: Any) -> None:
        """A step with batched begins.

        Raises:
            ValueError: for another placement, and where forwards draw random numbers that have to be the same.
        """
        if not isinstance(owner._placement, Forward):
            raise ValueError(
                f"batched is given, and placement is {owner._placement.name!r}: only placement='forward' shows each row of "
                "a batch the weights of its own direction; give it, with distribution=zokern.LowRank(1), or leave batched "
                "out"
            )
        tree = owner._placement.modules
        if tree != self.tree:
            self.known, self.tree = {}, tree


def refuse_draws(owner: Any) -> None:
    """
    Raises:
        ValueError: always.
    """
    raise ValueError(
        "batched is given, and paired_randomness=True asks for forwards that draw the same: rows of one forward draw "
        "each their own; give paired_randomness='auto', or leave batched out"
        if owner.paired_randomness is True
        else "batched is given, and a module of the model is in training mode and draws (dropout): rows of one forward "
        "draw each their own, so the losses would not compare; call model.eval(), or set the dropout to 0"
    )


class Sharing:
    """Of one step: evaluates a round's probes."""

    def __init__(self, batched: Batched, probing: Probing) -> None:
        assert isinstance(probing.losses, PerExample)
        self.batched, self.probing, self.losses = batched, probing, probing.losses
        owner = probing.owner
        batched.begin(owner)
        if self.losses.draws is not None:
            refuse_draws(owner)
        modes = tuple(module.training for module in owner.module.modules())
        closure = getattr(self.losses.closure, "__code__", type(self.losses.closure))
        like = tuple(map(repeating.kinds_of, self.losses.batches or ()))
        self.kind = modes, closure, like, tuple(size == 1 for size in self.losses.sizes)

    def __call__(self, probes: list[Terms]) -> list[Tensor]:
        most, losses = self.losses.most or len(probes), []
        for start in range(0, len(probes), most):
            losses += self._of(probes[start : start + most])
        return losses

    def _of(self, probes: list[Terms]) -> list[Tensor]:
        if len(probes) == 1 or not any(probes):
            return self._in_turn(probes)
        key = len(probes), self.kind
        kind = self.batched.known.get(key)
        if kind is None:
            kind = self.batched.known[key] = Kind()
            return self._tested(probes, kind)
        if kind.why_not:
            return self._in_turn(probes)
        try:
            losses = self._together(probes, Rows(len(probes), kind.kinds))
        except NotInBlocks:
            before = _size(kind.kinds)
            found = self._tested(probes, kind)
            if not kind.why_not and _size(kind.kinds) == before:
                self._give_up(kind, "the closure computes otherwise than when it was tested, each time")
            return found
        if kind.open and len(set(torch.stack(losses).tolist())) > 1:
            return self._tested(probes, kind)
        self.losses.largest = max(self.losses.largest, len(probes))
        return losses

    def _in_turn(self, probes: Sequence[Terms]) -> list[Tensor]:
        return self.probing.alone(probes)

    def _together(self, probes: Sequence[Terms], rows: Rows) -> list[Tensor]:
        return self.probing.together(probes, rows)

    # --------------------------------------------------------------------------------------------------------- the test

    def _tested(self, probes: list[Terms], kind: Kind) -> list[Tensor]:
        """The losses one after another, and what the test finds, in `kind`."""
        devices = {p.device for p in self.probing.sweep.params}
        generators = Generators(devices)
        before = generators.states()
        alone = self._in_turn(probes)
        after = generators.states()
        drew = not all(map(torch.equal, before, after))
        named = {name: list(each) for name, each in self.losses.named.items()}
        self.batched.testing = True
        if drew:  # each micro-batch from where it began: how much those before it draw may depend on what they draw
            generators.go_to(before)
            self.losses.draws = Draws(devices)
        try:
            why_not = self._test(probes, kind, alone, self.losses.draws)
        except NotInBlocks as reason:
            why_not = str(reason)
        except Exception as error:
            why_not = f"the repeated batch raises {type(error).__name__}: {str(error)[:200]}"
            if isinstance(error, OUT):
                why_not += f" (give a number below {len(probes)} as batched)"
        finally:
            self.batched.testing = False
            self.losses.named, self.losses.draws = named, None
            if drew:
                generators.go_to(after)
        if why_not:
            self._give_up(kind, why_not)
        return alone

    def _give_up(self, kind: Kind, why_not: str) -> None:
        kind.why_not = why_not
        if not self.batched.told:
            self.batched.told = True
            self.probing.owner._guards.warn(
                "batched", f"batched: probes are evaluated one after another, because {why_not}"
            )

    def _test(self, probes: list[Terms], kind: Kind, alone: list[Tensor], draws: Draws | None) -> str:
        """Why the rows do not keep apart; "" where they do. draws: None where no forward draws."""
        count, single = len(probes), Rows(1)
        self._together([next(filter(None, probes))], single)
        if draws is not None:
            draws.probed()
        rows = Rows(count)
        rows.alone = single.alone
        losses = torch.stack(self._together(probes, rows))
        for use, found in rows.kinds.items():
            kind.kinds.setdefault(use, set()).update(found)
        reference = torch.stack(alone)
        spread = float(reference.max() - reference.min())
        half = rows.half or self._half()
        if draws is None and not self._agree(losses, reference, spread, half):
            k = int((losses - reference).abs().nan_to_num(torch.inf).argmax())
            return (
                f"a forward of all gives {float(losses[k]):.6g} as the loss of probe {k}, and a forward of it alone "
                f"{float(reference[k]):.6g}: {MIXED}{ROUNDED if half else ''}{OTHERWISE}"
            )
        moved, why_not = self._change(probes, kind, losses)
        kind.open = not moved and (draws is not None or not spread > 0.0)
        return why_not

    def _half(self) -> bool:
        return self.losses.half is not None or any(p.element_size() == 2 for p in self.probing.sweep.params)

    def _agree(self, losses: Tensor, reference: Tensor, spread: float, half: bool) -> bool:
        most = SHARE * spread + (HALF_ROUNDING if half else ROUNDING) * float(reference.abs().max())
        near = (losses - reference).abs() <= most
        return bool((near | (losses == reference) | (losses.isnan() & reference.isnan())).all())

    def _change(self, probes: list[Terms], kind: Kind, losses: Tensor) -> tuple[bool, str]:
        """Whether any loss has reacted to its own direction; what is wrong. Run b changes the blocks k whose number k + 1
        has bit b, so that no two blocks change in the same runs."""
        count, some = len(probes), next(filter(None, probes))
        for factor in FACTORS:
            moved = False
            for bit in range(count.bit_length()):
                changed = [(k + 1) >> bit & 1 == 1 for k in range(count)]
                other = [
                    {seed: factor * a for seed, a in (terms or some).items()} if turn else terms
                    for terms, turn in zip(probes, changed, strict=True)
                ]
                found = torch.stack(self._together(other, Rows(count, kind.kinds)))
                for k, (before, after) in enumerate(zip(losses.tolist(), found.tolist(), strict=True)):
                    same = before == after or (before != before and after != after)
                    if not same and not changed[k]:
                        return moved, (f"the loss of probe {k} changes with the direction of others: {MIXED}")
                    moved = moved or not same
            if moved:
                return True, ""
        return False, ""


def _size(kinds: dict[Hashable, set[bool]]) -> int:
    return sum(map(len, kinds.values()))

"""Copies that hold a perturbation which is yet to be asked for: which, of what weights, and what makes them worthless.

A pipelined update writes them. The next step uses those that are what it wants: the same directions, the same eps, and
weights and states that nothing has written to since, as torch counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from zokern.passes.update import Terms
from zokern.sweep import Member


@dataclass(frozen=True)
class Ready:
    """A copy: where it is; of which weights, in which state, and by what. TRUSTED stands for one of a step that is
    captured, whose launches are made only where the copy is what they want."""

    address: int
    versions: tuple[int, ...]  # of the weights and the states
    eps: float
    terms: Terms


TRUSTED = Ready(0, (), 0.0, {})
Copies = list[tuple[Member, Tensor]]  # with the members that they are of


def maker(terms: Terms, eps: Sequence[float]) -> Callable[[Member, Tensor], Ready]:
    """What makes a member's copy the perturbation by these terms; eps: each row's."""

    def of(member: Member, copy: Tensor) -> Ready:
        return Ready(copy.data_ptr(), versions(member), eps[member.row], dict(terms))

    return of


def versions(member: Member) -> tuple[int, ...]:
    return tuple(t._version for t in (member.param, *member.states.values()) if not t.is_inference())


@dataclass(frozen=True)
class Promise:
    """What a launch of a captured step has written: `copies`, along `terms`, by eps of each row, from weights with these
    versions. It becomes the `Ready` of each when somebody else than the next launch asks."""

    copies: Copies
    terms: Terms
    eps: list[float]
    seen: list[tuple[int, ...]]

    def holds(self, terms: Terms, eps: Sequence[float]) -> bool:
        return self.terms == terms and self.eps == list(eps) and self.seen == [versions(m) for m, _ in self.copies]

    def ready(self) -> dict[int, Ready]:
        pairs = zip(self.copies, self.seen, strict=True)
        return {
            id(m.param): Ready(copy.data_ptr(), seen, self.eps[m.row], dict(self.terms)) for (m, copy), seen in pairs
        }


def promise(copies: Copies, terms: Terms, eps: Sequence[float]) -> Promise:
    return Promise(copies, terms, list(eps), [versions(m) for m, _ in copies])

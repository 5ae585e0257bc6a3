"""The weights that updates wait for, as the last step has left them: what is done to them from outside is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from zokern._checks import ZokernWarning
from zokern.sweep import NOTHING, Member, Sweep

Version = tuple[int, int]  # address and torch's count of changes

CHANGED = (
    "{name} was changed between two steps while the updates of {steps} steps wait to be added to it, and they still will "
    "be: change weights after opt.fold(), or put them in opt.folded(). What p.data is until then lacks these updates. "
    "Where the new values have them already (they are of a state_dict() of the module), load the optimizer's state_dict() "
    "of the same step too"
)
GONE = (
    "{name} is not in the module any more, and the updates of {steps} steps wait to be added to it: call opt.fold() before "
    "parameters are replaced (load_state_dict with assign=True does that), and make a new optimizer after it"
)
LOST = (
    "state_dict() lacks the updates of {steps} steps, which waited to be added to {name} and others in an optimizer that "
    "is gone: keep the optimizer until the module is saved, or call opt.fold() at the end of training"
)


class Waiting:
    """steps: how many steps' updates wait for the members of `sweep`. Outlives the optimizer, in the module's hooks."""

    def __init__(self) -> None:
        self.steps = 0
        self.sweep = NOTHING
        self._versions: list[Version] = []
        self._told = False

    def note(self, sweep: Sweep, steps: int) -> None:
        """The weights are as they should be now."""
        self.sweep, self.steps, self._versions = sweep, steps, versions(sweep.params)

    def forget(self) -> None:
        self.steps, self._versions = 0, []

    def changed(self) -> str:
        """The first weight that was changed since `note`; empty where none was."""
        if not self._versions or self._versions == versions(self.sweep.params):
            return ""
        return next(m.name for m, one in zip(self.sweep, self._versions, strict=True) if one != versions([m.param])[0])

    def news(self) -> str:
        """What is to be told of a changed weight; once."""
        name = "" if self._told or not self.steps else self.changed()
        self._told = self._told or bool(name)
        return CHANGED.format(name=name, steps=self.steps) if name else ""

    def tell(self) -> None:
        """Between steps."""
        message = self.news()
        if message:
            warnings.warn(message, ZokernWarning, stacklevel=6)

    def tell_lost(self, module: nn.Module) -> None:
        """The optimizer is gone, and a state_dict of this module was asked for; once."""
        own = {id(p) for p in module._parameters.values()}
        at = [i for i, m in enumerate(self.sweep) if id(m.param) in own]
        if self.steps and at and all(versions([self.sweep[i].param])[0] == self._versions[i] for i in at):
            message = LOST.format(steps=self.steps, name=self.sweep[at[0]].name)
            self.steps = 0
            warnings.warn(message, ZokernWarning, stacklevel=6)


def versions(params: Iterable[Tensor]) -> list[Version]:
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in params]


def alike(sweep: Iterable[Member]) -> list[Any]:
    """What two sweeps share that the same terms are of."""
    return [(id(m.param), m.tensor_id, m.row, m.param.shape) for m in sweep]


def refuse_gone(module: nn.Module, sweep: Sweep, steps: int) -> None:
    """
    Raises:
        RuntimeError: naming a parameter that the module has no more.
    """
    there = set(map(id, module.parameters()))
    gone = next((m.name for m in sweep if id(m.param) not in there), None)
    if gone is not None:
        raise RuntimeError(GONE.format(name=gone, steps=steps))

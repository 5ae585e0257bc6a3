"""A module is looked at in each step: what changed in it is taken in, or refused by name.

Frozen layers that are unfrozen and new parameters are trained from then on, as parameters() groups do it; a parameter
that is trained and that the module no longer has is an error. With groups of the user's, only what they list is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, Protocol

from torch import Tensor, nn

from zokern import parts
from zokern.layers import RandomBlocks
from zokern.optim import parameters
from zokern.optim.buffers import Buffers
from zokern.optim.pairing import may_draw
from zokern.placement import fsdp


class Owner(Protocol):
    """The optimizer."""

    param_groups: list[dict[str, Any]]
    layers: RandomBlocks | None
    state: Any
    _parameters: parameters.Parameters


class Watch:
    """Of one module. all_of_it: the optimizer was given the module, and not groups of its parameters.

    random: the submodules that may draw. buffers: what forwards may change besides. sharded: those of FSDP2.
    """

    def __init__(self, module: nn.Module, *, all_of_it: bool) -> None:
        self.module, self.all_of_it = module, all_of_it
        self.known: dict[int, str] = {}
        self._remember()

    def _remember(self) -> None:
        modules = list(self.module.modules())
        # Entries are compared by what they are, and held, so that an id stands for one object.
        # The views follow their dicts; a ScriptModule has lists instead, as it has the same entries for good.
        self._places: list[Iterable[Any]] = [d.values() for m in modules for d in (m._parameters, m._modules)]
        self._held = list(chain.from_iterable(self._places))
        self._ids = list(map(id, self._held))
        named = dict(self.module.named_parameters())
        self.known = {id(p): name for name, p in named.items()}
        self._frozen = [p for p in named.values() if not p.requires_grad]
        self.random = sorted(filter(may_draw, modules), key=lambda m: any(True for _ in m.children()))  # leaves first
        self.sharded = fsdp.modules_of(self.module)
        self._prepared = False
        self.buffers = Buffers(self.module)

    def changed(self) -> bool:
        """Whether a module or a parameter was put in, taken out or replaced anywhere, or one unfrozen."""
        if self.sharded:
            self._let_go()
        if self._ids != list(map(id, chain.from_iterable(self._places))):
            return True
        return bool(self._frozen) and any(p.requires_grad for p in self._frozen)

    def _let_go(self) -> None:
        """Of what a forward between two steps has gathered."""
        if self.sharded:
            fsdp.let_go(self.sharded)
            if not self._prepared:
                fsdp.prepare(self.sharded)
                self._prepared = True

    def take_in(self, owner: Owner) -> None:
        """Takes in what changed, where `changed` says so.

        Raises:
            RuntimeError: naming a parameter that is trained and that the module has no more.
        """
        before, held = self.known, self._held  # until the end: ids of what was freed could come again
        named = dict(self.module.named_parameters())
        now = {id(p): name for name, p in named.items()}
        own = [p for group in owner.param_groups for p in group["params"]]
        for p in own:
            if p.requires_grad and id(p) in before and id(p) not in now:
                name = before[id(p)]
                what = "another tensor has its name" if name in named else "nothing has its name"
                raise RuntimeError(
                    f"parameter {name} is not in the module any more ({what}), and this optimizer trains it; make a new "
                    "optimizer after changing the module"
                )
        for p in own:
            if parts.is_dtensor(p) and id(p) in now and id(p) not in owner._parameters.registry.ids:
                self._take_over(owner, p, now[id(p)])
        grouped = set(map(id, own))
        was_frozen = set(map(id, self._frozen))
        new = [
            (name, p)
            for name, p in named.items()
            if p.requires_grad and id(p) not in grouped and (id(p) not in before or id(p) in was_frozen)
        ]
        if self.all_of_it and new:
            for name, p in new:
                parameters.check_parameter(p, f"params: {name}")
            for name, p in new:
                owner._parameters.registry.adopt(p, name)
                owner.param_groups[0]["params"].append(p)
        if owner.layers is not None:
            owner.layers.bind_again(self.module)
        owner._parameters.forget()
        self._remember()
        self._let_go()
        del held

    def _take_over(self, owner: Owner, p: Tensor, name: str) -> None:
        """A shard that somebody has put into a group for the parameter of this name, as accelerate does: it has its id."""
        with_states = [other for other in owner.state if owner._parameters.registry.names.get(id(other)) == name]
        if with_states:
            raise RuntimeError(
                f"parameter {name} was sharded after steps had been done, and what this optimizer keeps of it is of the "
                "whole tensor; shard the module before the first step"
            )
        owner._parameters.registry.replace(p, name)

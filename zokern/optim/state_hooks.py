"""A module's state_dict() while updates wait: folded copies in the place of the weights, which stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zokern.optim.waiting import Waiting, versions

if TYPE_CHECKING:
    from zokern.optim.folding import Folding


class Hook:
    """Of a module: outlives the optimizer that it is for, tells then what is lost with it, and is taken off by the next
    one. A copy of the module, or one from a file, has one that is nothing."""

    handle: RemovableHandle

    def __init__(self, entries: FoldedEntries | None = None) -> None:
        self.entries = None if entries is None else weakref.ref(entries)
        self.waiting = None if entries is None else entries.waiting

    def __call__(self, module: nn.Module, saved: dict[str, Any], prefix: str, metadata: Any) -> None:
        entries = None if self.entries is None else self.entries()
        if entries is not None:
            entries.replace(module, saved, prefix)
        elif self.waiting is not None:
            self.waiting.tell_lost(module)

    def is_over(self) -> bool:
        return self.entries is None or self.entries() is None

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook()

    def __reduce__(self) -> Any:
        return Hook, ()


HOOKS: weakref.WeakKeyDictionary[nn.Module, list[Hook]] = weakref.WeakKeyDictionary()  # that are on a module


class FoldedEntries:
    """Hooks on the modules whose weights wait for updates. A tied weight has one copy, while anybody holds it."""

    def __init__(self, folding: Folding, waiting: Waiting) -> None:
        self.folding, self.waiting = weakref.ref(folding), waiting
        self.owner: weakref.ref[Any] | None = None
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._made: dict[int, tuple[weakref.ref[Tensor], object, tuple[int, ...]]] = {}  # by the parameter's id

    def watch(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if module not in self._hooked:
                hooks = HOOKS.setdefault(module, [])
                for hook in filter(Hook.is_over, hooks):
                    hook.handle.remove()
                own = Hook(self)
                own.handle = module.register_state_dict_post_hook(own)
                hooks[:] = [*(hook for hook in hooks if not hook.is_over()), own]
                self._hooked.add(module)

    def replace(self, module: nn.Module, saved: dict[str, Any], prefix: str) -> None:
        """The module's own entries."""
        folding, owner = self.folding(), None if self.owner is None else self.owner()
        if folding is None or owner is None or not folding.has_waiting(owner):
            return
        members = {id(m.param): m for m in folding.sweep}
        if folding.placement.fold is not None:  # inside folded(), whose stand-ins are no use outside of it
            members |= {id(one): members[id(site.param)] for site, one in folding.placement.pairs}
        for name, p in module._parameters.items():
            member = members.get(id(p))
            key = prefix + name
            if member is not None and key in saved:
                copy = self._copy(folding, owner, member)
                saved[key] = nn.Parameter(copy, member.param.requires_grad) if saved[key] is p else copy

    def _copy(self, folding: Folding, owner: Any, member: Any) -> Tensor:
        p, pending = member.param, folding.placement.pending
        of = versions([p])[0]
        if id(p) in self._made:
            held, by, (*there, version) = self._made[id(p)]
            copy = held()
            if copy is not None and by is pending and tuple(there) == of and copy._version == version:
                return copy
        copy = folding.copy(owner, member)
        self._made[id(p)] = weakref.ref(copy), pending, (*of, copy._version)
        return copy

"""An optimizer's state_dict, and a run that goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zokern.interrupts import HeldInterrupts
from zokern.optim import carried, loading, state
from zokern.optim.built import Built
from zokern.optim.events import Careful, FallsBehind
from zokern.optim.flat import Flats
from zokern.optim.parameters import Active
from zokern.placement.shadow import Exact
from zokern.sweep import NOTHING


class Saving(Built):
    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled whole: it holds on to its module. Save state_dict() and "
            "load it into a new optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict plus the entry "zokern": what it takes to continue with the same noise. The first group has it
        once more, as text, for torch.distributed.checkpoint. A journal that is written has all steps before it is made."""
        for listener in self.listeners:
            if isinstance(listener, FallsBehind):
                listener.flush()
        saved = super().state_dict()
        saved["zokern"] = {
            "format": state.FORMAT,
            "contract": "zk1",
            "method": type(self).__name__,
            "seed": self.seed,
            "tensor_ids": self._parameters.ids(self),
            "module": self.module is not None,
            "names": self._parameters.names(self),
            "counters": self.counters,
            "skipped": self.skipped_steps,
            "flat": self.flat_steps,
            "options": dict(self.options),
            "history": self.history(),
            "states": [[bool(self.state.get(p)) for p in group["params"]] for group in self.param_groups],
        }
        waiting = None if self._folding is None else self._folding.save(self)
        if waiting is not None:
            saved["zokern"] |= {"format": state.WITH_PENDING, "pending": waiting}
        saved["param_groups"][0][carried.KEY] = carried.packed(saved["zokern"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a saved run: step, seed, tensor ids, hyper-parameters. All of it, or, where it raises, nothing.

        Raises:
            TypeError, ValueError: if the state is not zokern's, of another contract, method, options or parameters, or
                holds what no run leaves; naming the entry.
            RuntimeError: inside a step.
            JournalError: while a journal is written, for any state but that which the optimizer has.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        with HeldInterrupts(), self._turn.of("load_state_dict"):
            saved = loading.read(state_dict, self._ours())
            for listener in self.listeners:
                if isinstance(listener, Careful):
                    listener.before_load(self._is_at(saved))
            self._load(state_dict, saved)
            if isinstance(self._placement, Exact):
                self._placement.forget()
            self.compare_anew()

    def _ours(self) -> loading.Ours:
        names = self._parameters.names(self)
        return loading.Ours(
            type(self).__name__, self.options, names, self.module is not None, self.param_groups, self._parameters.spec,
            self.pipelined, self.layers is None, self.completed,
        )  # fmt: skip

    def _is_at(self, saved: loading.Saved) -> bool:
        """Whether the next step would be the same with what was saved."""
        waiting = None if self._folding is None else self._folding.save(self)
        here = self.seed, self._passes.counters.steps, self._parameters.ids(self), self.history(), waiting
        kept = None if saved.pending is None else saved.pending.entry()
        there = saved.seed, saved.counters.steps, saved.tensor_ids, saved.history, kept
        every = [p for group in self.param_groups for p in group["params"]]
        return loading.same(here, there) and all(
            loading.same(self.state.get(p, {}), saved.states.get(p, {})) for p in every
        )

    def _load(self, state_dict: Mapping[str, Any], saved: loading.Saved) -> None:
        kept = {
            name: value for name, value in vars(self).items() if name in ("state", "param_groups", "seed", "active")
        }
        ids, counters, history = self._parameters.ids(self), self._passes.counters, self.history()
        skips, flats = vars(self._skips).copy(), self._guards.flats
        try:
            super().load_state_dict({name: value for name, value in state_dict.items() if name != "zokern"})
            carried.leave_out(self.param_groups)
            for p in set(self.state) - set(saved.states):
                del self.state[p]
            for p, values in saved.states.items():
                self.state[p] = values  # as they were saved: torch has cast them to the parameter's dtype
            self.load_history(saved.history)
            self._parameters.take_ids(self, saved.tensor_ids)
            self.active = Active(NOTHING, [], frozenset())  # it holds states
            self.seed, self._passes.counters = saved.seed, saved.counters
            self._skips.load(saved.skipped)
            self._guards.flats = Flats(saved.flat)
            if self._folding is not None:
                self._folding.load(saved.pending)
        except BaseException:
            vars(self).update(kept)
            self.load_history(history)
            self._parameters.take_ids(self, ids)
            self._passes.counters = counters
            vars(self._skips).update(skips)
            self._guards.flats = flats
            raise

"""An optimizer's state_dict, and a run that goes on from one."""

from __future__ import annotations

from typing import Any

from zokern.optim import state
from zokern.optim.built import Built
from zokern.optim.flat import Flats
from zokern.optim.parameters import Active
from zokern.sweep import NOTHING, Counters


class Saving(Built):
    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled whole: it holds on to its module. Save state_dict() and "
            "load it into a new optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict plus the entry "zokern": what it takes to continue with the same noise."""
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
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a saved run: step, seed, tensor ids, hyper-parameters.

        Raises:
            ValueError: if the state is not zokern's, or of another contract, method, options or parameters.
        """
        if "numbers" in vars(self):
            raise RuntimeError("load_state_dict was called inside a step; load before it or after it")
        saved = dict(state_dict)
        own = saved.pop("zokern", None)
        names = self._parameters.names(self)
        state.check(own, type(self).__name__, self.options, names, self.module is not None, self.completed)
        kept = state.check_tensors(saved, self.param_groups, self._parameters.spec)
        super().load_state_dict(saved)
        for p, values in kept.items():
            self.state[p] = values  # as they were saved: torch has cast them to the parameter's dtype
        self._parameters.take_ids(self, own["tensor_ids"])
        self.active = Active(NOTHING, [], frozenset())  # it holds states
        self.seed = own["seed"]
        self._passes.counters = Counters(**own["counters"])
        self._skips.load(own["skipped"])
        self._guards.flats = Flats(own.get("flat", 0))
        self.load_history(own["history"])

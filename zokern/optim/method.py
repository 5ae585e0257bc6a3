"""What makes a method: the questions that a step asks of it. Most have an answer already; `rounds` never has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from zokern.optim import state
from zokern.optim.drivers import Rounds
from zokern.optim.ledger import Ledger
from zokern.optim.numbers import StepNumbers
from zokern.optim.parameters import Active
from zokern.optim.update import Estimate, Rates, sgd
from zokern.passes.update import Update


class Method:
    """takes_vector_losses: a closure may return the loss of each example. takes_rewards: it usually
    returns a reward or a metric, whose values may well be equal, and a run stored without `maximize` maximized. scaled:
    directions are divided by the root of the state "h". measures_slope: metrics["projected_gradient"] is the loss's slope,
    and worth showing.

    During a step, `active` is what it moves and `numbers` where its numbers come from.
    """

    takes_vector_losses = False
    takes_rewards = False
    scaled = False
    measures_slope = True
    active: Active
    numbers: StepNumbers

    @abstractmethod
    def rounds(self) -> Rounds:
        """Yields each round's probes, is sent their losses, and returns what they say about the gradient."""

    def forwards(self) -> int:
        """Calls of the closure in a step, each over all micro-batches."""
        raise NotImplementedError(f"{type(self).__name__} does not say how many forwards a step takes")

    def states(self) -> state.Spec:
        """What it keeps for each parameter: name -> (dtype, initial value). Asked once, when the settings are known."""
        return {}

    def settle(self) -> None:
        """Called once, when settings and parameters are known: refuses settings that do not go together."""

    def update(self, estimate: Estimate, rates: Rates) -> Update:
        """The pass that applies an estimate."""
        return sgd(estimate, rates)

    def plain_updates(self) -> bool:
        """Whether each update is a sum of directions that earlier ones and the weights have no part in, but for weight
        decay: rule "axpy", no states. Such updates can wait (fold_every)."""
        return not self.states() and type(self).update is Method.update

    def advice(self) -> str:
        """What to look at first where a step moves the weights by far too much; "" is for lr alone."""
        return ""

    def schedule(self, step: int) -> list[float]:
        """Numbers that the update of a step takes from the step's number alone, computed on the host."""
        return []

    def structure(self) -> Hashable:
        """Of the current step: steps with equal ones launch the same kernels, which is what a graph can hold."""
        return None

    def once(self) -> bool:
        """Whether a step of the current structure comes once in a run: a graph of it would never pay."""
        return False

    def row_key(self, param: Tensor) -> Hashable:
        """Parameters of one group whose keys differ get rows of coefficients of their own."""
        return None

    # ----------------------------------------------------------------------------- what it remembers besides states

    def note(self, ok: Tensor, ledger: Ledger) -> None:
        """Called when all of a step is known but its last pass: remembers the step, through `ledger`, which takes it back
        if the pass is not made. ok (0-d bool, on the device) says whether the pass does anything."""

    def applied(self, ok: Tensor) -> None:
        """Called after the step's last pass; ok (0-d bool, on the device) says whether it did anything."""

    def launched(self, step: int) -> None:
        """Called after a launch of a captured step, with its number: the host notes what the device has noted."""

    def history(self) -> list[Any]:
        """What it remembers of earlier steps, as plain values and tensors, for a state_dict."""
        return []

    def load_history(self, history: list[Any]) -> None:
        """Takes back what `history` gave; raises ValueError, before anything is changed, for what it cannot have given."""
        if history:
            raise ValueError(
                f"state_dict: history has {len(history)} entries, and {type(self).__name__} remembers nothing"
            )

    def memory(self) -> list[float | Tensor]:
        """Numbers of the last step that it needs again in later ones, for the journal: those that a device has as 0-d
        tensors, float64, that nothing writes to later."""
        return []

    def remember(self, step: int, memory: list[float], dropped: set[int], ok: bool) -> None:
        """Takes back what `memory` gave of a step, when a run is taken up from its journal."""

    def why_not_graphed(self) -> str | None:
        """Why its steps are not the same launches each time, if they are not."""
        return None

    def captured_tensors(self) -> list[Tensor]:
        """What a captured step works on beside parameters and states."""
        return []

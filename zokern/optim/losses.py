"""From a closure to the numbers of a step: what it may return, how micro-batches are put together, and what is finite.

A probe's loss L is one float64 number, or a vector where the method takes the loss of each example:

    without batches    L = what closure() returns
    reduction="mean"   L = sum_i w_i closure(batch_i) / sum_i w_i        w_i = 1 unless batch_weights are given
    reduction="sum"    L = sum_i w_i closure(batch_i)

and where the closure returns several losses by name, each of them is L = sum_n v_n loss_n, v_n = 1 unless loss_weights
are given.
"""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zokern import _checks
from zokern._checks import ZokernWarning
from zokern.optim import causes, frameworks
from zokern.optim.arriving import Arriving
from zokern.optim.ledger import Ledger
from zokern.optim.pairing import Draws
from zokern.passes.update import CPU, sent
from zokern.sweep import Counters

Closure = Callable[..., Any]
# Losses of a round's probes on this process -> as many, with which all processes go on.
Reduce = Callable[[list[Tensor]], list[Tensor]]
REDUCTIONS = ("mean", "sum")
HALVES = (torch.float16, torch.bfloat16)


def _listed(given: Any, name: str) -> list[Any]:
    """The entries of an argument, which may come from a generator."""
    if name == "batches" and isinstance(given, Tensor | Mapping | np.ndarray | str):
        raise TypeError(
            f"batches is one {type(given).__name__}, and would be taken apart into its entries; give a list, "
            "for example [x] for one batch or x.split(8) for several"
        )
    try:
        return list(given)
    except TypeError as error:
        raise TypeError(f"{name} must be a list, got {type(given).__name__}; give one entry for each batch") from error


def weights_of(given: Any, batches: list[Any] | None) -> list[float]:
    if batches is None:
        raise ValueError("batch_weights are given and batches are not; they go in pairs")
    weights = [
        _checks.check_number(w, f"batch_weights[{i}]", 0.0) for i, w in enumerate(_listed(given, "batch_weights"))
    ]
    if len(weights) != len(batches):
        raise ValueError(f"batch_weights has {len(weights)} entries and batches has {len(batches)}; they go in pairs")
    if weights and not 0.0 < sum(weights) < math.inf:
        raise ValueError(f"batch_weights add up to {sum(weights)}; some must be above 0, and their sum a finite number")
    return weights


def _float(loss: Any, which: str) -> float:
    try:
        return float(loss)
    except OverflowError as error:
        raise ValueError(f"closure must return {which} as a number that a float64 can hold; scale it down") from error


class Losses:
    """Of one step. `each`: every probe's loss so far, 0-d, as `gather` gave it; `named`: this process' losses by name.

    reduce: a round's losses on this process -> as many, with which all processes go on; None for one process alone.
    shared: with other ranks. `evaluate` then gives the weighted sum over the micro-batches, of which there may be none, and
    `weight` the weights' sum. partial: the closure may return None, where another rank has the loss.

    Raises:
        TypeError, ValueError: for what does not go together, and from `evaluate` for what a closure may not return.
    """

    def __init__(
        self,
        closure: Closure | None,
        batches: Iterable[Any] | None = None,
        batch_weights: Iterable[float] | None = None,
        reduction: str = "mean",
        loss_weights: Mapping[str, float] | None = None,
        *,
        vectors: bool = False,
        reduce: Reduce | None = None,
        maximize: bool | None = False,
        shared: bool = False,
    ) -> None:
        if closure is None or not callable(closure):
            raise TypeError(causes.NO_CLOSURE)
        if type(closure) is not FunctionType:
            frameworks.refuse_automatic(closure)
        self.closure, self.vectors, self.reduce, self.maximize = closure, vectors, reduce, maximize
        self.values: list[float] | None = None  # all of them, where they are on the host
        self.draws: Draws | None = None
        self.half: torch.dtype | None = None  # of a loss with 16 bits
        self.graph = False  # a loss came with one
        self.shared, self.partial, self.nothing = shared, False, 0
        self.batches = None if batches is None else _listed(batches, "batches")
        if self.batches is not None and not self.batches and not shared:
            raise ValueError("batches is empty; leave the step out, or give what the closure is to be called with")
        self.weights: Sequence[float | Tensor] | None = None
        if batch_weights is not None:
            self.weights = weights_of(batch_weights, self.batches)
        self.total: Tensor | None = None  # of the weights, where a device has them
        self.reduction = reduction
        if reduction != "mean":
            _checks.check_choice(reduction, "reduction", REDUCTIONS)
            if self.batches is None:
                raise ValueError(f"reduction={reduction!r} is over batches, and none are given")
        if loss_weights is not None and not isinstance(loss_weights, Mapping):
            raise TypeError(f"loss_weights must be a dict of weights by name, got {type(loss_weights).__name__}")
        self.loss_weights = dict(loss_weights or {})
        for name, weight in self.loss_weights.items():
            _checks.check_number(weight, f"loss_weights[{name!r}]")
        self.each: list[Tensor] = []
        self.named: dict[str, list[Tensor]] = {}

    def weigh(self, weights: Tensor) -> None:
        """By numbers of a device, float64 [M + 1]: each micro-batch's, and their sum."""
        *self.weights, self.total = weights.unbind()

    @property
    def empty(self) -> bool:
        """Of a rank that is out of data."""
        return self.batches is not None and not self.batches

    @property
    def weight(self) -> float:
        """Of this rank's loss among the others'."""
        if self.nothing:
            return 0.0
        if self.weights is not None:
            return float(sum(map(float, self.weights)))
        return 1.0 if self.batches is None else float(len(self.batches))

    def evaluate(self, counters: Counters, device: torch.device | None = None) -> Tensor:
        """The loss of the weights that the closure sees now. device: where it has to be; None for anywhere."""
        losses, by_name = [], []
        for i, arguments in enumerate(self._arguments()):
            if self.draws is not None:
                self.draws.start(i)
            try:
                returned = self.closure(*arguments)
            except RuntimeError as error:
                if causes.is_of_backward(error):
                    raise RuntimeError(causes.LEAVE_OUT) from error
                raise
            counters.forwards += 1
            if returned is None and self.partial:
                self.nothing += 1
                returned = 0.0
            if isinstance(returned, Mapping):
                by_name.append({name: self._number(loss, device, name) for name, loss in returned.items()})
                losses.append(self._weighted(by_name[-1]))
            else:
                losses.append(self._number(returned, device))
        if by_name:
            self._note(by_name, len(losses))
        return losses[0] if self.batches is None else self._together(losses)

    def unnamed(self) -> TypeError:
        """What is wrong with one loss where losses have weights by name."""
        return TypeError(
            f"loss_weights are given for {', '.join(map(repr, self.loss_weights))}, and the closure returns one loss; "
            "return a dict of losses by name"
        )

    def _arguments(self) -> Iterable[tuple[Any, ...]]:
        """What the closure is called with, for each micro-batch."""
        return [()] if self.batches is None else zip(self.batches, strict=True)

    def gather(self, losses: list[Tensor]) -> list[Tensor]:
        """A round's losses, as all processes have them; minus these where the step is to maximize."""
        if self.reduce is not None:
            count, losses = len(losses), self.reduce(losses)
            if not isinstance(losses, list) or len(losses) != count or not all(isinstance(x, Tensor) for x in losses):
                raise TypeError(f"reduce must return a list of {count} tensors, as many losses as it was given")
        for loss in losses:
            self.each.append(loss.mean() if loss.dim() else loss)
        return [-loss for loss in losses] if self.maximize else losses

    def forget(self) -> None:
        """The step begins anew."""
        self.each, self.named = [], {}

    def finite(self, *, captured: bool = False) -> tuple[Tensor, Tensor]:
        """All losses so far [P], and whether every one of them is finite, 0-d. captured: nobody may read a value."""
        every = torch.stack(self.each) if self.each else torch.empty(0, dtype=torch.float64, device=CPU)
        if captured or every.device.type != "cpu":
            return every, torch.isfinite(every).all()
        self.values = every.tolist()
        return every, torch.tensor(all(map(math.isfinite, self.values)), device=CPU)

    def metrics(self) -> dict[str, Tensor]:
        """The mean over the step's probes of each named loss, as "loss/NAME"."""
        return {f"loss/{name}": torch.stack(each).mean().to(torch.float32) for name, each in self.named.items()}

    def _together(self, losses: list[Tensor]) -> Tensor:
        if len({loss.dim() for loss in losses}) > 1:
            raise TypeError(
                "closure returned one loss for some batches and a vector for others; return the same for all"
            )
        if losses[0].dim():
            if self.weights is not None or self.reduction != "mean":
                raise ValueError(
                    "batch_weights and reduction='sum' go with one loss for each batch, and the closure returns the loss "
                    "of each example; return their mean or sum"
                )
            return torch.cat(losses)
        return self._mean(losses)

    def _mean(self, losses: list[Tensor]) -> Tensor:
        """Of the micro-batches' losses, or their sum, added in order: ranks with one each have the same bits."""
        if self.weights is not None:
            losses = [loss * weight for loss, weight in zip(losses, self.weights, strict=True)]
        total = functools.reduce(torch.add, losses)
        if self.reduction != "mean" or self.shared:
            return total
        return total / (self.weight if self.total is None else self.total)

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        """The sum of losses by name."""
        if not losses:
            raise ValueError("closure returned an empty dict; return at least one loss by name")
        unknown = [name for name in self.loss_weights if name not in losses]
        if unknown:
            raise ValueError(
                f"loss_weights has {', '.join(map(repr, unknown))}, and the closure returned losses called "
                f"{', '.join(map(repr, losses))}; make the names agree"
            )
        if len({loss.shape for loss in losses.values()}) > 1:
            shapes = ", ".join(f"{name!r} {tuple(loss.shape)}" for name, loss in losses.items())
            raise TypeError(f"closure returned losses of several shapes: {shapes}; return the same for all")
        return torch.stack([loss * self.loss_weights.get(name, 1.0) for name, loss in losses.items()]).sum(dim=0)

    def _note(self, by_name: list[dict[str, Tensor]], count: int) -> None:
        """Each named loss of a probe, put together as the loss is."""
        if len(by_name) != count or any(losses.keys() != by_name[0].keys() for losses in by_name):
            raise ValueError("closure returned other names for one batch than for another; return the same for all")
        for name in by_name[0]:
            parts = [losses[name] for losses in by_name]
            loss = parts[0] if self.batches is None else self._together(parts)
            self.named.setdefault(name, []).append(loss.mean() if loss.dim() else loss)

    def _number(self, loss: Any, device: torch.device | None, name: str | None = None) -> Tensor:
        """As float64, 0-d, or 1-D where the method takes vectors. name: of one loss among several."""
        if self.loss_weights and name is None:
            raise self.unnamed()
        which = "the loss" if name is None else f"the loss {name!r}"
        if device is not None and (not isinstance(loss, Tensor) or loss.device != device):
            raise TypeError(f"closure must return {which} as a tensor on {device} to be captured")
        if not isinstance(loss, Tensor):
            if isinstance(loss, np.ndarray | np.generic) and loss.size == 1:
                self.half = torch.float16 if loss.dtype == np.float16 else self.half
                loss = loss.item()
            if type(loss) is float or isinstance(loss, numbers.Real):
                return torch.tensor(_float(loss, which), dtype=torch.float64, device=CPU)
            raise TypeError(f"closure must return {which} as a scalar tensor, got {type(loss).__name__}")
        if loss.dtype.is_complex:
            raise TypeError(f"closure must return {which} as a real number, got a tensor of {loss.dtype}")
        if loss.layout is not torch.strided:
            raise TypeError(f"closure must return {which} as a dense tensor, got one of {loss.layout}; call to_dense()")
        if loss.dtype in HALVES:
            self.half = loss.dtype
        if loss.grad_fn is not None:
            self.graph = True
        if self.vectors and loss.dim() == 1 and loss.numel() > 0:
            return loss.detach().to(torch.float64)
        if loss.numel() != 1:
            raise TypeError(
                f"closure must return {'one loss' if name is None else which}, got a tensor of shape {tuple(loss.shape)}; "
                "take its mean" + (" or return a vector with the loss of each example" if self.vectors else "")
            )
        return loss.detach().reshape(()).to(torch.float64)


class Skips:
    """Counts the steps that were skipped because a loss was not finite, and warns of the first.

    count: int64, 0-d, on the device of the losses.
    """

    def __init__(self) -> None:
        self.count = torch.zeros((), dtype=torch.int64, device=CPU)
        self.seen: Arriving | None = None  # the count
        self.news = False  # the last step may have been skipped
        self._warned = False

    def load(self, count: int) -> None:
        self.count = torch.tensor(count, dtype=torch.int64, device=CPU)
        self._warned = self._warned or count > 0

    def note(self, ok: Tensor, gate: Tensor | None, ledger: Ledger) -> Tensor:
        """A step that is ok or not; returns whether its passes do anything, which the gate of a captured step says too."""
        if gate is not None:
            opened = gate.reshape(()).to(torch.bool)
            ledger.add(self.count, ~ok & opened)
            return ok & opened
        if ok.device.type == "cpu" and self.count.device.type == "cpu":
            if not ok:
                ledger.add(self.count, ~ok)
                self.news = True
        else:
            self.count = sent(self.count, ok.device)
            ledger.add(self.count, ~ok)
            self.news = True
        return ok

    def tell(self) -> None:
        """What there is to be told after a step, which is done then, also where a warning is an error."""
        if self.news:
            self.news = False
            if self.count.device.type == "cpu":
                self.warn()
            else:
                self.look()

    def look(self) -> None:
        """Starts a copy of the count to the host, to be looked at in a later step without waiting."""
        if self.count.device.type != "cpu" and self.seen is None and not self._warned:
            self.seen = Arriving(self.count)

    def warn(self) -> None:
        """Once, if the host knows of a step that was skipped."""
        count = 0
        if self._warned:
            return
        if self.count.device.type == "cpu":
            count = int(self.count)
        elif self.seen is not None and (come := self.seen.values()) is not None:
            count, self.seen = come, None
        if count:
            self._warned = True
            warnings.warn(
                "a loss was not finite, so the update of that step was skipped. The weights are those before it (under "
                "placement='inplace' to rounding). Further skips are only counted: see skipped_steps. Try a "
                "lower lr or eps, and in float16 bfloat16. A batch is to be drawn outside the closure: zokern.check says "
                "whether that is the same function twice",
                ZokernWarning,
                stacklevel=5,
            )

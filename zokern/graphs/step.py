"""A whole step, forwards and passes, as one CUDA graph: captured once, launched with a new batch, new seeds, scheduled lr.

What a launch is to read anew lies in device memory at fixed places: the batch, the step counter that the seeds are derived
from, and the groups' numbers (live.py). Everything else is as in `optimizer.step`, and so are the bits. The gain is
what launches cost: most of the step of a small model or a small batch, next to nothing of a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokern import _checks
from zokern.graphs.batch import copy_into, given, kind_of, on_device
from zokern.graphs.broken import explain
from zokern.graphs.cuda import new_graph
from zokern.graphs.kinds import MOST, Captured, Graphs, Layout, layout_of
from zokern.graphs.live import DeviceNumbers
from zokern.graphs.telling import Listening
from zokern.interrupts import HeldInterrupts
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.losses import weights_of
from zokern.passes import table
from zokern.passes.update import CPU

SUPPORTED = ("cuda",)
WARM_UP_STEPS = 2  # the first meets new streams of seeds and compiles; the second is like the captured one


class GraphedStep:
    """graphed(batch) is optimizer.step(lambda: closure(batch)) with the same bits, launched as a CUDA graph.

        step = GraphedStep(optimizer, closure, sample_batch)
        loss = step(batch)
        loss = step(batches=[first, second], batch_weights=[3, 5])  # optimizer.step(closure, batches, batch_weights=...)

    A journal may be begun and ended at any time: a launch leaves its numbers in device memory, from where they are copied
    out later.

    Args:
        optimizer: any of zokern's, on one CUDA device, without fold_every. With layers, placement is "inplace" or
            "shadow", update not "adamezo", and pipelined False. Of several ranks, on nccl and without compare_every.
        closure: closure(batch) returns the scalar loss, as a tensor on the device. It must launch the same kernels every
            time: no .item(), no printing of values, no moving between host and device, no shapes that depend on values.
            Modules are read when it is captured: later changes of the Python code go unnoticed. transformers (5.x) chooses
            another attention mask while it is captured than in eager steps: give its models a 4-D attention_mask and
            position_ids, and both are the same work.
        sample_batch: a tensor, or lists, tuples and mappings of tensors (nested as you like), of a kind of batch that will
            come: the constructor captures a step with it. None: the first call does. Tensors may be on the host: each call
            copies them to the device. Other values are part of the graph.
        max_graphs: a step with a batch of other shapes, dtypes or values, with other numbers of micro-batches, or of
            another kind (HELENE, with and without its curvature), is another graph, captured when it first comes. With
            pipelined=True each has two: of steps that find their first probe ready, and of others. So many are kept, by
            default 8; beyond that the longest unused one goes, with its memory. `captures` and `let_go` count them.
        reduction, loss_weights, batched: as optimizer.step's.

    A capture tries two steps without writing a weight, and captures one; weights, states and counters are unchanged after
    it. It takes the time of some steps. Steps of a kind that comes once (the first ones of a method that looks back) are
    done as optimizer.step does them.

    Raises:
        TypeError, ValueError: for an optimizer or a batch that does not fit, naming it and the remedy.
        RuntimeError: where the closure cannot be captured, naming the line, or parameters or groups have changed since; the
            weights are clean. optimizer.step still works.
    """

    def __init__(
        self,
        optimizer: ZerothOrderOptimizer,
        closure: Callable[[Any], Tensor],
        sample_batch: Any = None,
        *,
        max_graphs: int = MOST,
        reduction: str = "mean",
        loss_weights: Mapping[str, float] | None = None,
        batched: bool | int = False,
    ) -> None:
        if not isinstance(optimizer, ZerothOrderOptimizer):
            raise TypeError(f"optimizer must be one of zokern's, got {type(optimizer).__name__}")
        if not callable(closure):
            raise TypeError("closure must be a function of a batch that returns the loss")
        self.optimizer, self.closure = optimizer, closure
        self._how: dict[str, Any] = {"reduction": reduction, "loss_weights": loss_weights, "batched": batched}
        self._graphs = Graphs(_checks.check_integer(max_graphs, "max_graphs", 1))
        if optimizer.pipelined and max_graphs < 2:
            raise ValueError(
                "max_graphs must be at least 2 with pipelined=True, which has two graphs for each kind of batch"
            )
        self.device = device_of(optimizer)
        self._pool = self._new_pool()
        groups = optimizer.param_groups
        blocks = None if optimizer.layers is None else len(optimizer.layers.names)
        self._live = DeviceNumbers(optimizer.seed, len(groups), len(optimizer.schedule(0)), self.device, blocks)
        self._layout = Layout(None, None)
        if sample_batch is not None:
            self._graph([sample_batch], ["sample_batch"], None, many=False, sample=True)

    @property
    def captures(self) -> int:
        """How many graphs have been captured."""
        return self._graphs.captures

    @property
    def let_go(self) -> int:
        """How many of them were let go again, as there were more than max_graphs."""
        return self._graphs.let_go

    @torch.no_grad()
    def __call__(
        self, batch: Any = None, *, batches: Iterable[Any] | None = None, batch_weights: Iterable[float] | None = None
    ) -> Tensor:
        """One step; returns the loss, 0-d, on the device. Nothing waits for the device, but where a step is captured.

        batches, batch_weights: micro-batches, as optimizer.step takes them; a fixed number of them is one graph.
        """
        optimizer = self.optimizer
        device_of(optimizer)
        now = layout_of(optimizer)
        if self._graphs.kept and now.of_run != self._layout.of_run:
            raise RuntimeError(
                "parameters, groups, states or the seed of the optimizer are not those that were captured; make a new "
                "GraphedStep"
            )
        if now.copies != self._layout.copies:
            self._graphs.kept.clear()  # an eager step has made its copies elsewhere
        every, names, many = given(batch, batches)
        weights = None if batch_weights is None else self._weights(batch_weights, every if many else None)
        optimizer.ask_listeners()
        one = self._graph(every, names, weights, many, sample=False)
        if one is None:
            return self._eager(every, names, batch_weights, many)
        for static, own in zip(one.batches, every, strict=True):
            copy_into(static, own)
        if one.weights is not None:
            one.weights.copy_(torch.tensor(weights, dtype=torch.float64, device=CPU), non_blocking=True)
        self._fill()
        with HeldInterrupts(), optimizer.alone("step"):
            one.graph.launch()
            self._live.launched()
            optimizer.launched_again(one.telling, one.cost, one.active, one.copies)
        return optimizer.metrics["loss"]

    def _eager(
        self, batches: Sequence[Any], names: Sequence[str], weights: Iterable[float] | None, many: bool
    ) -> Tensor:
        """A step that comes once in a run, without a graph."""
        there = [on_device(batch, self.device, name) for batch, name in zip(batches, names, strict=True)]
        if many:
            return self.optimizer.step(self.closure, there, batch_weights=weights, **self._how)
        how = {name: value for name, value in self._how.items() if name != "reduction"}
        return self.optimizer.step(lambda: self.closure(there[0]), **how)

    def _graph(
        self, batches: Sequence[Any], names: Sequence[str], weights: list[float] | None, many: bool, *, sample: bool
    ) -> Captured | None:
        """Of this call; captured, where it is the first of its kind. None for a step that comes once in a run, which is
        captured for a sample alone: to find out whether the closure can be."""
        while True:
            kind = self._kind(batches, names, weights, many, ahead=self.optimizer.is_ahead())
            one = self._graphs.find(kind)
            if one is not None:
                return one
            if self.optimizer.once() and not sample:
                return None
            # A capture leaves no copy as the step before has filled it ahead: both kinds of pipelined steps at once.
            for ahead in [True, False] if self.optimizer.pipelined else [False]:
                if self._graphs.find(self._kind(batches, names, weights, many, ahead=ahead)) is None:
                    self._capture(batches, names, weights, many=many, ahead=ahead)

    # ------------------------------------------------------------------------------------------------- what a call gives

    def _weights(self, batch_weights: Iterable[float], batches: list[Any] | None) -> list[float]:
        """Of each batch, then their sum."""
        weights = weights_of(batch_weights, batches)
        if self.optimizer.num_ranks > 1:
            raise ValueError(
                "batch_weights are told to the other ranks by the host, and a graph cannot hold that: leave them out, or "
                "use optimizer.step"
            )
        return [*weights, float(sum(weights))]

    def _kind(self, batches: Sequence[Any], names: Sequence[str], weights: object, many: bool, *, ahead: bool) -> Any:
        kinds = [kind_of(*one) for one in zip(batches, names, strict=True)]
        return self.optimizer.structure(), ahead, many, weights is not None, kinds

    def _fill(self) -> None:
        self.optimizer.check_groups()
        step = self.optimizer.counters["steps"]
        self._live.fill(step, self.optimizer.param_groups, self.optimizer.schedule(step))
        self._live.leave_out(self.optimizer.dropped(step))

    # ------------------------------------------------------------------------------------------------------- capturing

    def _new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.no_grad()
    def _capture(
        self, batches: Sequence[Any], names: Sequence[str], weights: list[float] | None, *, many: bool, ahead: bool
    ) -> None:
        """Tries the current step with its passes switched off, then captures it; does neither of them."""
        optimizer, live = self.optimizer, self._live
        kind = self._kind(batches, names, weights, many, ahead=ahead)
        static = [on_device(batch, self.device, name) for batch, name in zip(batches, names, strict=True)]
        there = None if weights is None else torch.tensor(weights, dtype=torch.float64, device=CPU).to(self.device)
        self._graphs.make_room(kind)
        before, metrics, listeners = optimizer.counters, optimizer.metrics, optimizer.listeners
        optimizer.listeners = [listening := Listening(optimizer, self.device)]
        graph = new_graph(self.device, self._pool)
        work = self._work(static, there, many, ahead=ahead)
        try:
            self._fill()
            live.gate.zero_()
            # A closure with dropout draws in the first launch what it would have drawn in an eager step.
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                for _ in range(WARM_UP_STEPS):
                    graph.warm_up(work)
                    optimizer.set_counters(before)
                graph.capture(work)
            cost = {name: value - before[name] for name, value in optimizer.counters.items()}
            active = optimizer.active
            copies = list(optimizer.copies_ahead)
            held = table.cached(), active, active.sweep.tables(), optimizer.captured_tensors(), live.tensors()
            one = Captured(kind, graph, static, there, listening.telling(live.streams), cost, active, held, copies)
        except BaseException as error:
            self._pool = self._new_pool()  # the allocator may believe that it still records into the old one
            if isinstance(error, (TypeError, ValueError)) or not isinstance(error, Exception):
                raise
            raise RuntimeError(explain(error)) from error
        finally:
            optimizer.set_counters(before)
            optimizer.metrics, optimizer.listeners = metrics, listeners
            live.gate.fill_(1)
            optimizer.trust(False)
        if self._graphs.kept and layout_of(self.optimizer) != self._layout:
            self._graphs.kept.clear()  # they work on what is elsewhere now
        self._layout = layout_of(self.optimizer)
        self._graphs.add(one)

    def _work(self, static: Sequence[Any], weights: Tensor | None, many: bool, *, ahead: bool) -> Callable[[], None]:
        """A step on the static batches, its numbers on the device. ahead: its first probe's copies are there already."""

        def work() -> None:
            self._live.begin()
            self.optimizer.trust(ahead)
            if many:
                self.optimizer.step_with(self._live, self.closure, static, weights=weights, **self._how)
            else:
                self.optimizer.step_with(self._live, lambda: self.closure(static[0]), **self._how)
            self._live.count()

        return work


def device_of(optimizer: ZerothOrderOptimizer) -> torch.device:
    """The one device; refuses what a graph cannot hold."""
    reason = optimizer.why_not_graphed()
    if reason is not None:
        raise ValueError(f"GraphedStep cannot take this optimizer: {reason}; use optimizer.step")
    devices = {p.device for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if len(devices) != 1:
        raise ValueError(f"GraphedStep needs all parameters on one device; they are on {sorted(map(str, devices))}")
    device: torch.device = devices.pop()
    if device.type not in SUPPORTED:
        raise ValueError(
            f"GraphedStep captures CUDA graphs, and the parameters are on {device}, where a launch costs next to "
            "nothing: use optimizer.step"
        )
    return device

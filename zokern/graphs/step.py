"""A whole step, forwards and passes, as one CUDA graph: captured once, launched with a new batch, new seeds, scheduled lr.

What a launch is to read anew lies in device memory at fixed places: the batch, the step counter that the seeds are derived
from, and the groups' numbers (live.py). Everything else is as in `optimizer.step`, and so are the bits. The gain is
what launches cost: most of the step of a small model or a small batch, next to nothing of a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokern.graphs.batch import copy_into, on_device
from zokern.graphs.cuda import Graph, new_graph
from zokern.graphs.live import DeviceNumbers
from zokern.interrupts import HeldInterrupts
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.parameters import Active
from zokern.passes import table

SUPPORTED = ("cuda",)
WARM_UP_STEPS = 2  # the first meets new streams of seeds and compiles; the second is like the captured one


@dataclass
class _Captured:
    graph: Graph
    metrics: dict[str, Tensor]  # filled by a launch
    cost: dict[str, int]  # what a step adds to the counters
    active: Active
    held: object  # what the graph's launches read, to keep it from being freed


class GraphedStep:
    """graphed(batch) is optimizer.step(lambda: closure(batch)) with the same bits, launched as a CUDA graph.

    Args:
        optimizer: any of zokern's, on one CUDA device, without pipelined=True, and while no journal is written: those do
            other work in each step, or have to know its numbers on the host. With layers, placement is "inplace" or
            "shadow", and update not "adamezo". Of several ranks, on an nccl group and without compare_every.
        closure: closure(batch) returns the scalar loss, as a tensor on the device. It must launch the same kernels every
            time: no .item(), no printing of values, no moving between host and device, no shapes that depend on values.
            Modules are read when it is captured: later changes of the Python code go unnoticed. transformers (5.x) chooses
            another attention mask while it is captured than in eager steps: give its models a 4-D attention_mask and
            position_ids, and both are the same work.
        sample_batch: a tensor, or lists, tuples and mappings of tensors (nested as you like), with the shapes and dtypes of
            all batches to come; other values in it are part of the graph. Tensors may be on the host: each call copies
            them to the device.

    The constructor tries two steps without writing a weight, and captures one; weights, states and counters are unchanged
    after it. A method whose steps differ (HELENE, with and without its curvature) is captured once for each kind; steps of
    a kind that comes once (the first ones of a method that looks back) are done as optimizer.step does them.

    Raises:
        TypeError, ValueError: for an optimizer or a batch that does not fit, naming it and the remedy.
        RuntimeError: where the closure cannot be captured, or parameters or groups have changed since; the weights are
            clean. optimizer.step still works.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer, closure: Callable[[Any], Tensor], sample_batch: Any) -> None:
        if not isinstance(optimizer, ZerothOrderOptimizer):
            raise TypeError(f"optimizer must be one of zokern's, got {type(optimizer).__name__}")
        if not callable(closure):
            raise TypeError("closure must be a function of a batch that returns the loss")
        self.optimizer, self.closure = optimizer, closure
        self.device = self._check()
        self._batch = on_device(sample_batch, self.device, "sample_batch")
        self._pool = self._new_pool()
        groups = optimizer.param_groups
        blocks = None if optimizer.layers is None else len(optimizer.layers.names)
        self._live = DeviceNumbers(optimizer.seed, len(groups), len(optimizer.schedule(0)), self.device, blocks)
        self._captured: dict[Hashable, _Captured] = {}
        self._capture()
        self._layout = self._layout_now()

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """One step; returns the loss, 0-d, on the device. Nothing waits for the device."""
        optimizer = self.optimizer
        self._check()
        if self._layout_now() != self._layout:
            raise RuntimeError(
                "parameters, groups, states or the seed of the optimizer are not those that were captured; make a new "
                "GraphedStep"
            )
        copy_into(self._batch, batch, "batch")
        if optimizer.structure() not in self._captured:
            if optimizer.once():
                return optimizer.step(lambda: self.closure(self._batch))
            self._capture()
        self._fill()
        one = self._captured[optimizer.structure()]
        with HeldInterrupts(), optimizer.alone("step"):
            one.graph.launch()
            optimizer.launched_again(one.metrics, one.cost, one.active)
        return optimizer.metrics["loss"]

    def _fill(self) -> None:
        self.optimizer.check_groups()
        step = self.optimizer.counters["steps"]
        self._live.fill(step, self.optimizer.param_groups, self.optimizer.schedule(step))
        self._live.leave_out(self.optimizer.dropped(step))

    # ------------------------------------------------------------------------------------------------------- capturing

    def _new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.no_grad()
    def _capture(self) -> None:
        """Tries the current step with its passes switched off, then captures it; does neither of them."""
        optimizer, live = self.optimizer, self._live
        before, metrics = optimizer.counters, optimizer.metrics
        graph = new_graph(self.device, self._pool)
        self._fill()
        live.gate.zero_()
        # A closure with dropout draws in the first launch what it would have drawn in an eager step.
        generators = torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])
        try:
            with generators:
                for _ in range(WARM_UP_STEPS):
                    graph.warm_up(self._step)
                    optimizer.set_counters(before)
                graph.capture(self._step)
            cost = {name: value - before[name] for name, value in optimizer.counters.items()}
            active = optimizer.active
            held = table.cached(), active, active.sweep.tables(), optimizer.captured_tensors(), live.tensors()
            captured = _Captured(graph, optimizer.metrics, cost, active, held)
        except BaseException as error:
            self._pool = self._new_pool()  # the allocator may believe that it still records into the old one
            if isinstance(error, (TypeError, ValueError)) or not isinstance(error, Exception):
                raise
            what, *_ = [*str(error).strip().splitlines(), type(error).__name__]  # CUDA gives advice on further lines
            raise RuntimeError(
                f"the step could not be captured in a CUDA graph: {what}. The closure must not wait for the device "
                "(.item(), printing), move tensors between host and device, or call what cannot be captured; "
                "optimizer.step(lambda: closure(batch)) works without a graph"
            ) from error
        finally:
            optimizer.set_counters(before)
            optimizer.metrics = metrics
            live.gate.fill_(1)
        self._captured[optimizer.structure()] = captured

    def _step(self) -> None:
        """A step on the static batch, with all of its numbers on the device."""
        self._live.begin()
        self.optimizer.step_with(self._live, lambda: self.closure(self._batch))

    # --------------------------------------------------------------------------------------------------------- checks

    def _check(self) -> torch.device:
        """The one device; refuses what a graph cannot hold."""
        reason = self.optimizer.why_not_graphed()
        if reason is not None:
            raise ValueError(f"GraphedStep cannot take this optimizer: {reason}; use optimizer.step")
        devices = {p.device for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        if len(devices) != 1:
            raise ValueError(f"GraphedStep needs all parameters on one device; they are on {sorted(map(str, devices))}")
        device: torch.device = devices.pop()
        if device.type not in SUPPORTED:
            raise ValueError(
                f"GraphedStep captures CUDA graphs, and the parameters are on {device}, where a launch costs next to "
                "nothing: use optimizer.step"
            )
        return device

    def _layout_now(self) -> object:
        """What the captured launches have read once and for all: where the tensors are, and how they are grouped."""
        optimizer = self.optimizer
        groups = [
            [(p.data_ptr(), p.requires_grad, p.shape, p.dtype) for p in group["params"]]
            for group in optimizer.param_groups
        ]
        return optimizer.seed, groups, [t.data_ptr() for t in optimizer.captured_tensors()]

"""The training loop: draw a batch, let the optimizer step on its loss, log, evaluate now and then.

The model is in eval mode throughout (no dropout: both forwards of a step must compute the same function) and nothing
records gradients. Losses stay on the device between log lines, so that the host waits for it only there (attention.py says
with which transformers).
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zokern import ZokernWarning
from zokern.finetune.batches import Batch, Order
from zokern.finetune.clock import Clock, memory
from zokern.finetune.display import Display, Status
from zokern.finetune.options import Options
from zokern.finetune.output import Output
from zokern.finetune.tasks import Task, evaluate


@dataclasses.dataclass
class Result:
    """What the loop did. seconds: training without evaluations, forwards, passes and evaluations."""

    steps: int
    interrupted: bool
    accuracy: tuple[float, float]
    loss: tuple[float, float]
    seconds: dict[str, float]


class Interrupt:
    """SIGINT as a flag, which the closure turns into KeyboardInterrupt: a step is left where its weights are known.

    A second SIGINT acts as usual, for a run that hangs. Off outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def installed(self) -> Iterator[Interrupt]:
        """The handler, for the length of a block."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def raise_if_asked(self) -> None:
        """Raise KeyboardInterrupt after a Ctrl-C."""
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def factor(schedule: str, warmup: int, steps: int) -> Callable[[int], float]:
    """step -> share of the learning rate: rises over `warmup` steps, then stays, or falls to 0 at `steps`."""

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]

    return at


def train(task: Task, optimizer: Any, options: Options, output: Output, display: Display, done: int = 0) -> Result:
    """Run steps `done` to options.steps, or fewer after a Ctrl-C. The weights are clean on return."""
    return _Training(task, optimizer, options, output, display, done).run()


class _Training:
    """A run of the loop. step: how many are done; evaluating: seconds of that; before, after: held out."""

    def __init__(
        self, task: Task, optimizer: Any, options: Options, output: Output, display: Display, done: int
    ) -> None:
        self.task, self.optimizer, self.options, self.output, self.display = task, optimizer, options, output, display
        schedule = factor(options.lr_schedule, options.warmup_steps, options.steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        self.scheduler.last_epoch, self.scheduler._step_count = done, done + 1
        for group, base in zip(optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * schedule(done)
        self.order = Order(len(task.sets["train"][1]), options.seed)
        for _ in range(done * options.accumulate):
            self.order.draw(options.batch_size)  # the batches that the run has had
        self.clock, self.interrupt, self.status = Clock(task.device), Interrupt(), Status()
        self.sign = -1.0 if optimizer.maximize else 1.0
        self.recent: list[Tensor] = []
        self.step, self.resumed, self.interrupted = done, done > 0, False
        self.begun, self.evaluating = time.perf_counter(), 0.0

    def run(self) -> Result:
        with torch.no_grad(), self.display, self.interrupt.installed(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ZokernWarning)  # of skipped steps: the display has their count
            self.before = self.after = self._before()
            self.status.accuracy_before = self.before[0]
            spent = max((record["seconds"] for record in self.output.records if self.resumed), default=0.0)
            self.begun, self.evaluating = time.perf_counter() - spent, 0.0
            try:
                while self.step < self.options.steps:
                    self._step()
            except KeyboardInterrupt:
                self.interrupted = True
                self.display.note(f"stopped by Ctrl-C after {self.step} steps; saving")
            trained = time.perf_counter() - self.begun - self.evaluating
            try:
                self.after = self._assess()
            except KeyboardInterrupt:  # while the last evaluation ran: what has been learnt is saved all the same
                self.interrupted = True
                self.display.note("the last evaluation was skipped; the accuracy is the one before")
            self.display.finish(dataclasses.replace(self.status, step=self.step))
        measured = self.clock.seconds()
        forwards, stepping = measured.get("forwards", 0.0), measured.get("step", 0.0)
        seconds = {"training": trained, "forwards": forwards, "passes": stepping - forwards,
                   "evaluations": self.evaluating}  # fmt: skip
        accuracy, loss = zip(self.before, self.after, strict=True)
        return Result(self.step, self.interrupted, accuracy, loss, seconds)

    def _before(self) -> tuple[float, float]:
        for record in self.output.records:
            if record["kind"] == "eval":
                return record["accuracy"], record["loss"]
        return self._assess()

    def _step(self) -> None:
        options = self.options
        draws = [self.order.draw(options.batch_size) for _ in range(options.accumulate)]
        micro = [self.task.batch("train", draw) for draw in draws]
        with self.clock.measure("step"):
            loss = self.optimizer.step(self._closure, micro)
        self.recent.append(self.sign * loss.detach())
        self.step += 1
        if self.step % options.log_every == 0 or self.step == options.steps:
            self._report()
        if options.eval_every and self.step % options.eval_every == 0 and self.step < options.steps:
            self.after = self._assess()
        self.scheduler.step()
        self.interrupt.raise_if_asked()

    def _closure(self, batch: Batch) -> Tensor:
        self.interrupt.raise_if_asked()
        with self.clock.measure("forwards"):
            return self.sign * self.task.loss(batch)

    def _check(self) -> None:
        if not self.interrupted:
            self.interrupt.raise_if_asked()

    def _assess(self) -> tuple[float, float]:
        start = time.perf_counter()
        try:
            accuracy, loss = evaluate(self.task, "eval", self.options.eval_batch_size, self._check)
        finally:
            self.evaluating += time.perf_counter() - start
        self.status.accuracy = accuracy
        self.output.log({"kind": "eval", "step": self.step, "loss": loss, "accuracy": accuracy, **self._progress()})
        return accuracy, loss

    def _progress(self) -> dict[str, Any]:
        group = self.optimizer.param_groups[0]
        return {
            "lr": float(group["lr"]),
            "eps": float(group["eps"]),
            "seconds": round(time.perf_counter() - self.begun - self.evaluating, 4),
            "forwards": self.optimizer.counters["forwards"],
        }

    def _report(self) -> None:
        losses, status = torch.stack(self.recent).float(), self.status
        self.recent.clear()
        finite = losses[losses.isfinite()]
        loss = finite.mean().item() if len(finite) else float("nan")
        if math.isfinite(loss):
            status.loss = 0.6 * status.loss + 0.4 * loss if math.isfinite(status.loss) else loss
        status.projected_gradient = float(self.optimizer.metrics["projected_gradient"])
        status.step, status.memory = self.step, memory(self.task.device)
        status.skipped = self.optimizer.skipped_steps
        self.output.log({"kind": "train", "step": self.step, "loss": loss, "skipped": status.skipped,
                         "projected_gradient": status.projected_gradient, **self._progress()})  # fmt: skip
        self.display.update(status)
        self.clock.seconds()

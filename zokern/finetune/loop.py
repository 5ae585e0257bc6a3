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
    schedule = factor(options.lr_schedule, options.warmup_steps, options.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    scheduler.last_epoch, scheduler._step_count = done, done + 1
    for group, base in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = base * schedule(done)
    order, clock, interrupt = Order(len(task.sets["train"][1]), options.seed), Clock(task.device), Interrupt()
    status, begun, evaluating = Status(), time.perf_counter(), 0.0
    recent: list[Tensor] = []
    sign = -1.0 if optimizer.maximises else 1.0  # what maximises takes a reward
    step, interrupted = done, False
    for _ in range(done * options.accumulate):
        order.draw(options.batch_size)  # the batches that the run has had

    def closure(batch: Batch) -> Tensor:
        interrupt.raise_if_asked()
        with clock.measure("forwards"):
            return sign * task.loss(batch)

    def check() -> None:
        if not interrupted:
            interrupt.raise_if_asked()

    def assess() -> tuple[float, float]:
        nonlocal evaluating
        start = time.perf_counter()
        try:
            accuracy, loss = evaluate(task, "eval", options.eval_batch_size, check)
        finally:
            evaluating += time.perf_counter() - start
        status.accuracy = accuracy
        output.log({"kind": "eval", "step": step, "loss": loss, "accuracy": accuracy, **progress()})
        return accuracy, loss

    def progress() -> dict[str, Any]:
        group = optimizer.param_groups[0]
        return {
            "lr": float(group["lr"]),
            "eps": float(group["eps"]),
            "seconds": round(time.perf_counter() - begun - evaluating, 4),
            "forwards": optimizer.counters["forwards"],
        }

    def report() -> None:
        losses = torch.stack(recent).float()
        recent.clear()
        finite = losses[losses.isfinite()]
        loss = finite.mean().item() if len(finite) else float("nan")
        if math.isfinite(loss):
            status.loss = 0.6 * status.loss + 0.4 * loss if math.isfinite(status.loss) else loss
        status.projected_gradient = float(optimizer.metrics["projected_gradient"])
        status.step, status.memory, status.skipped = step, memory(task.device), optimizer.skipped_steps
        output.log({"kind": "train", "step": step, "loss": loss, "projected_gradient": status.projected_gradient,
                    "skipped": status.skipped, **progress()})  # fmt: skip
        display.update(status)
        clock.seconds()

    with torch.no_grad(), display, interrupt.installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ZokernWarning)  # of skipped steps: the display has their count
        earlier = [record for record in output.records if record["kind"] == "eval"]
        before = after = (earlier[0]["accuracy"], earlier[0]["loss"]) if earlier else assess()
        status.accuracy_before = before[0]
        begun = time.perf_counter() - max((record["seconds"] for record in output.records if done), default=0.0)
        evaluating = 0.0
        try:
            while step < options.steps:
                micro = [task.batch("train", order.draw(options.batch_size)) for _ in range(options.accumulate)]
                with clock.measure("step"):
                    loss = optimizer.step(closure, micro)
                recent.append(sign * loss.detach())
                step += 1
                if step % options.log_every == 0 or step == options.steps:
                    report()
                if options.eval_every and step % options.eval_every == 0 and step < options.steps:
                    after = assess()
                scheduler.step()
                interrupt.raise_if_asked()
        except KeyboardInterrupt:
            interrupted = True
            display.note(f"stopped by Ctrl-C after {step} steps; saving")
        trained = time.perf_counter() - begun - evaluating
        try:
            after = assess()
        except KeyboardInterrupt:  # while the last evaluation ran: what has been learnt is saved all the same
            interrupted = True
            display.note("the last evaluation was skipped; the accuracy is the one before")
        display.finish(dataclasses.replace(status, step=step))
    measured = clock.seconds()
    forwards, stepping = measured.get("forwards", 0.0), measured.get("step", 0.0)
    seconds = {"training": trained, "forwards": forwards, "passes": stepping - forwards, "evaluations": evaluating}
    return Result(step, interrupted, (before[0], after[0]), (before[1], after[1]), seconds)

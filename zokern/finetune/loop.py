"""The training loop: draw a batch, let the optimizer step on its loss, log, evaluate now and then.

The model is in eval mode throughout (no dropout: both forwards of a step must compute the same function) and nothing
records gradients. Losses stay on the device between log lines, so that the host waits for it only there (attention.py says
with which transformers).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zokern.distributed.exchange import RankError
from zokern.finetune.batches import Batch, Order
from zokern.finetune.clock import Clock, memory
from zokern.finetune.display import Display, Status
from zokern.finetune.options import Options
from zokern.finetune.output import Output
from zokern.finetune.ranks import Team
from zokern.finetune.records import planned, score, scored
from zokern.finetune.samples import Said, look
from zokern.finetune.stopping import Stop
from zokern.finetune.tasks import Task, evaluate
from zokern.optim.events import StepEvent


@dataclasses.dataclass
class Result:
    """What the loop did. seconds: training without evaluations, forwards, passes and evaluations; the first is of the whole
    run, the others are since step `since`, at which this process has begun: 0 where the run was never taken up. samples:
    what was said of some held-out texts before and after (samples.py)."""

    steps: int
    interrupted: bool
    accuracy: tuple[float, float]
    loss: tuple[float, float]
    seconds: dict[str, float]
    since: int = 0
    samples: tuple[list[Said], list[Said]] = ([], [])


def factor(schedule: str, warmup: int, steps: int) -> Callable[[int], float]:
    """step -> share of the learning rate: rises over `warmup` steps, then stays, or falls to 0 at `steps`."""

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]

    return at


@dataclasses.dataclass
class Begun:
    """How far a run is. losses: of the steps since the last line of metrics.jsonl, as the optimizer has them."""

    done: int = 0
    losses: Sequence[float] = ()


def train(
    task: Task,
    optimizer: Any,
    options: Options,
    output: Output,
    display: Display,
    stop: Stop,
    save: Callable[[], None],
    begun: Begun | None = None,
    team: Team | None = None,
) -> Result:
    """Run the steps that are left up to options.steps, or fewer after a signal. The weights are clean on return.

    save: called after the last step, before the last evaluation. team: the ranks that do them together.
    """
    return _Training(task, optimizer, options, output, display, stop, begun or Begun(), team or Team()).run(save)


class _Training:
    """A run of the loop. step: how many are done; evaluating: seconds of that; before, after: held out."""

    def __init__(
        self,
        task: Task,
        optimizer: Any,
        options: Options,
        output: Output,
        display: Display,
        stop: Stop,
        begun: Begun,
        team: Team,
    ) -> None:
        self.task, self.optimizer, self.options, self.output, self.display = task, optimizer, options, output, display
        self.stop, self.team, done = stop, team, begun.done
        self.schedule = factor(options.lr_schedule, options.warmup_steps, options.steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        self.scheduler.last_epoch, self.scheduler._step_count = done, done + 1
        self._rate(done)
        self.order = Order(len(task.sets["train"][1]), options.seed)
        for _ in range(done * options.accumulate):
            self.order.draw(options.batch_size)  # the batches that the run has had
        self.clock, self.status = Clock(task.device), Status()
        self.sign = -1.0 if optimizer.maximize else 1.0
        self.recent = [self.sign * torch.tensor(loss, device=task.device) for loss in begun.losses]
        self.step, self.since, self.interrupted = done, done, False
        self.begun, self.evaluating = time.perf_counter(), 0.0
        self.failed: Exception | None = None

    def _rate(self, step: int) -> None:
        """The lr of a step, as the scheduler sets it."""
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self.schedule(step)

    def run(self, save: Callable[[], None]) -> Result:
        with torch.no_grad(), self.display:
            spent = max((record["seconds"] for record in self.output.records), default=0.0)
            self.begun = time.perf_counter() - spent
            self.before = self.after = self._logged(0) or self._assess()
            self.begun, self.evaluating = time.perf_counter() - spent, 0.0
            self.status.accuracy_before = self.before[0]
            self._catch_up()
            self.stop.finishing = True
            if self.options.journal:
                self.optimizer.listeners.insert(0, self._told)  # before the journal
            self.display.begin(self.step)
            try:
                while self.step < self.options.steps:
                    self._step()
            except (KeyboardInterrupt, RankError) as error:
                self._stopped_in_training(error)
            except Exception:
                if self.team.size > 1 and self.optimizer._ranks is not None and not self.optimizer._ranks.compared:
                    self.team.every(None)  # the others have been told of it, and ask whether it was a signal
                raise
            finally:
                if self.options.journal:
                    self.optimizer.listeners.remove(self._told)
            trained = time.perf_counter() - self.begun - self.evaluating
            save()
            try:
                self.after = self._logged(self.step) or self._assess()
            except KeyboardInterrupt:  # while the last evaluation ran: what has been learnt is saved
                self.interrupted = True
                self.display.note("the last evaluation was skipped; the accuracy is the one before")
            self.display.finish(dataclasses.replace(self.status, step=self.step))
        measured = self.clock.seconds()
        forwards, stepping = measured.get("forwards", 0.0), measured.get("step", 0.0)
        seconds = {"training": trained, "forwards": forwards, "passes": stepping - forwards,
                   "evaluations": self.evaluating}  # fmt: skip
        accuracy, loss = zip(self.before, self.after, strict=True)
        return Result(self.step, self.interrupted, accuracy, loss, seconds, self.since, self._samples())

    def _stopped_in_training(self, error: BaseException) -> None:
        """All ranks leave a step together, also where the signal came to one of them."""
        if self.team.size > 1:
            if self.optimizer._ranks is None or self.optimizer._ranks.exchange.broken:
                raise error
            self.stop.asked = next((one for one in self.team.every(self.stop.asked) if one is not None), None)
            if self.stop.asked is None:
                raise error
        self.interrupted = True
        if self.step == 0:
            raise KeyboardInterrupt
        self.display.note(f"stopped by {self.stop.name} after {self.step} steps; saving")

    def _samples(self) -> tuple[list[Said], list[Said]]:
        """Of the first evaluation and of the last."""
        held = [record.get("samples", []) for record in self.output.records if record["kind"] == "eval"]
        return (held[0], held[-1]) if held else ([], [])

    def _logged(self, step: int) -> tuple[float, float] | None:
        """Held-out accuracy and loss after a step, where metrics.jsonl has them."""
        for record in self.output.records:
            if record["kind"] == "eval" and record["step"] == step:
                return score(record), float("nan") if record["loss"] is None else record["loss"]
        return None

    def _catch_up(self) -> None:
        """What the run was to do after its last step when it broke off."""
        if not 0 < self.step < self.options.steps:
            return
        held = [record for record in self.output.records if record["kind"] == "eval"]
        if planned("eval", self.step, self.options) and self._logged(self.step) is None:
            self._rate(self.step - 1)  # which the line has
            self.after = self._assess()
            self._rate(self.step)
        elif held:
            self.after = self._logged(held[-1]["step"]) or self.after
            self.status.accuracy = self.after[0]

    def _step(self) -> None:
        options = self.options
        draws = [self.order.draw(options.batch_size) for _ in range(options.accumulate)]
        draws, weights = self.team.share(draws, options)
        micro = list(self.task.batches("train", draws))
        with self.clock.measure("step"):
            loss = self.optimizer.step(self._closure, self._unless_stopped(micro), batch_weights=weights)
        if self.failed is not None:
            raise self.failed
        if not options.journal:
            self._done(loss.detach())
        if options.eval_every and self.step % options.eval_every == 0 and self.step < options.steps:
            self.after = self._assess()
        self.scheduler.step()
        if self.team.size == 1:
            self.stop.raise_if_asked()

    def _unless_stopped(self, micro: list[Batch]) -> Iterator[Batch]:
        """Inside a step, where the other ranks hear of it."""
        if self.team.size > 1:
            self.stop.raise_if_asked()
        yield from micro

    def _told(self, event: StepEvent) -> None:
        """A step's line is written before the journal has the step: a run that goes on never misses one.

        An error waits until the step is over, so that the journal is told of it too.
        """
        if event.ok is not None and event.loss is not None:
            try:
                self._done(event.loss.detach())
            except Exception as error:
                self.failed = error

    def _done(self, loss: Tensor) -> None:
        self.recent.append(self.sign * loss)
        self.step += 1
        if self.step % self.options.log_every == 0 or self.step == self.options.steps:
            self._report()

    def _closure(self, batch: Batch) -> Tensor:
        self.stop.raise_if_asked()
        with self.clock.measure("forwards"):
            return self.sign * self.task.aim(batch)

    def _check(self) -> None:
        if not self.interrupted:
            self.stop.raise_if_asked()

    def _assess(self) -> tuple[float, float]:
        start = time.perf_counter()
        try:
            with self.optimizer.folded():
                size = self.options.eval_batch_size
                (accuracy, loss), said = self.team.from_first(
                    lambda: (evaluate(self.task, "eval", size, self._check), look(self.task))
                )
        finally:
            self.evaluating += time.perf_counter() - start
        self.status.accuracy = accuracy
        if self.step:
            self.display.assessed(self.step, self.status, loss)
        self.output.log({"kind": "eval", "step": self.step, "loss": loss, **scored(self.task.metric.name, accuracy),
                         "samples": said, **self._progress()})  # fmt: skip
        return accuracy, loss

    def _progress(self) -> dict[str, Any]:
        group = self.optimizer.param_groups[0]
        return {
            "lr": float(group["lr"]),
            "eps": float(group["eps"]),
            "seconds": round(time.perf_counter() - self.begun - self.evaluating, 4),
            "forwards": self._forwards(),
        }

    def _forwards(self) -> int:
        """Of this process; where ranks share out the directions, of all of them."""
        if self.team.size > 1 and self.options.parallel == "directions":
            return int(self.step * self.optimizer.forwards() * self.options.accumulate)
        return int(self.optimizer.counters["forwards"])

    def _report(self) -> None:
        losses, status = torch.stack(self.recent).float(), self.status
        self.recent.clear()
        finite = losses[losses.isfinite()]
        loss = finite.mean().item() if len(finite) else float("nan")
        if math.isfinite(loss):
            status.loss = 0.6 * status.loss + 0.4 * loss if math.isfinite(status.loss) else loss
        projected = float(self.optimizer.metrics["projected_gradient"])
        status.projected_gradient = projected if self.optimizer.measures_slope else None
        status.step, status.memory = self.step, memory(self.task.device)
        status.skipped = self.optimizer.skipped_steps
        self.output.log({"kind": "train", "step": self.step, "loss": loss, "skipped": status.skipped,
                         "projected_gradient": projected, **self._progress()})  # fmt: skip
        self.output.look()
        self.display.update(status)
        self.clock.seconds()

"""One process of benchmarks.llm.beside: loads the model, does steps when it is told to, and says what they took.

It has the `zokern` that PYTHONPATH finds, which may be an older build: all that it needs of it is there since 9a8c2c2.
Of `zokern finetune` the run itself is measured: zokern.finetune.finetune(options), journal and log lines included. Two of
its names are replaced. Order, which draws a batch at the beginning of each step: the step before is over when it is asked,
and it waits there for what to do next. Clock, which measures the forwards and the optimizer's step: it reads memory too.
So forwards, the optimizer's step without them, and the rest of the loop have each their time.

Takes JSON lines: {"way", "options"} once; then {"rows": indices of the sentences, "steps", "weigh"}. Answers with a JSON
line each. weigh: memory in place of time, once. resident: bytes held after a forward; alone: the peak of a forward beyond
that; forwards, between: the peaks of the steps beyond it, inside of forwards and outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import resident
from benchmarks.llm import released
from zokern.finetune import Options, finetune, loop, methods, run
from zokern.finetune.clock import Clock

LR, EPS = 1e-7, 1e-3  # lr is not 0: an update that moves nothing is left out
RELEASED = ("released", "released, one row")
_told = sys.stdout  # what a run prints goes elsewhere


def tell(**answer: Any) -> None:
    print(json.dumps(answer), file=_told, flush=True)


def hear() -> dict[str, Any]:
    """The next line; the process ends where there is none."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)  # in the middle of a run, whose output directory is the caller's
    told: dict[str, Any] = json.loads(line)
    return told


def own_memory(model: nn.Module) -> None:
    """Weights leave the file that they may be mapped from, so that all of them are held, and given back when replaced."""
    for p in model.parameters():
        p.data = p.data.clone()


class Watched(Clock):
    """A run's clock. peaks: of memory beyond `base`, by name, where `weighing`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.weighing, self.base, self.peaks = False, 0, {"forwards": 0, "between": 0}
        Turns.clock = self

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        with super().measure(name):
            if not self.weighing or name != "forwards":
                yield
                return
            self.note("between")
            yield
            self.note("forwards")

    def note(self, name: str) -> None:
        self.peaks[name] = max(self.peaks[name], resident.peak() - self.base)
        resident.forget_peak()

    def weigh(self) -> None:
        """Bytes from here on."""
        self.weighing, self.peaks = True, {"forwards": 0, "between": 0}
        resident.forget_peak()


class Turns:
    """Steps as they are asked for. Used as a run's Order too."""

    clock: Watched
    forward: Any  # rows -> loss: a forward alone
    tokens: Any  # rows -> how many the sentences have, without padding

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.rows, self.left, self.steps, self.begun = count, [0], 0, 0, 0.0
        self.before: dict[str, float] = {}
        self.base = self.alone = 0
        self.loss = 0.0

    def draw(self, size: int) -> Sequence[int]:
        if self.left == 0:
            if self.steps:
                self._answer()
            else:
                tell(texts=self.count)
            self._begin(hear())
        self.left -= 1
        return self.rows

    def _begin(self, order: dict[str, Any]) -> None:
        self.rows, self.left = order["rows"], order["steps"]
        self.steps = self.left
        if order["weigh"]:
            self._forward_alone()
        self.clock.weighing = False
        if order["weigh"]:
            self.clock.weigh()
        self.before, self.begun = self.clock.seconds(), time.perf_counter()

    def _forward_alone(self) -> None:
        """What a forward takes, before the first step: later, memory of the steps is there as well."""
        self.forward(self.rows)
        self.base = self.clock.base = resident.settle()
        self.loss = float(self.forward(self.rows))
        self.alone = resident.peak() - self.base

    def _answer(self) -> None:
        whole = time.perf_counter() - self.begun
        if self.clock.weighing:
            self.clock.note("between")
            tell(resident=self.base, alone=self.alone, loss=self.loss, **self.clock.peaks)
            return
        spent = {name: value - self.before.get(name, 0.0) for name, value in self.clock.seconds().items()}
        forwards, inside = spent["forwards"] / self.steps, spent["step"] / self.steps
        whole /= self.steps
        parts = {"forwards": forwards, "passes": inside - forwards, "rest": whole - inside}
        tell(seconds=whole, **parts, tokens=self.tokens(self.rows))


def turns_of(task: Any) -> None:
    """Forwards and tokens of a task are what Turns asks for."""
    Turns.forward = staticmethod(lambda rows: task.loss(task.batch("train", rows)))
    lengths = task.sets["train"][0].lengths
    Turns.tokens = staticmethod(lambda rows: sum(lengths[i] for i in rows))


def tuned(options: Options) -> None:
    """`zokern finetune`, step by step."""
    build, train = methods.build, run.train

    def built(model: nn.Module, chosen: Options) -> Any:
        tiny = nn.Linear(8, 8)  # code that a step loads is not its memory
        build(tiny, chosen).step(lambda: tiny(torch.ones(1, 8)).square().mean())
        own_memory(model)
        return build(model, chosen)

    def trained(task: Any, *rest: Any, **more: Any) -> Any:
        turns_of(task)
        return train(task, *rest, **more)

    methods.build, run.train = built, trained
    loop.Order, loop.Clock = Turns, Watched  # type: ignore[misc,assignment]
    finetune(options)


def loaded(options: Options) -> Any:
    """The task that `zokern finetune` would train, with its texts, and the number of its padding token."""
    found = run.load(options, lambda name, value: None)
    return found.task, found.tokenizer.pad_token_id


@torch.no_grad()
def looped(options: Options, way: str) -> None:
    """MeZO's released loop over the same sentences."""
    from zokern.bench.step_peers import Published

    task, pad = loaded(options)
    own_memory(task.model)
    rows, targets = task.sets["train"]
    first = torch.tensor([word[0] for word in task.words])
    if way == RELEASED[1] and not task.single:
        raise SystemExit(f"'{way}' takes words of one token each, and these are others")

    def batch(wanted: Sequence[int]) -> released.Nested:
        prompts = [rows.ids[i, : rows.lengths[i]].tolist() for i in wanted]
        words = task.words if way == RELEASED[0] else [[]]
        return released.nested(prompts, words, [targets[i] for i in wanted], pad)

    def of(made: released.Nested) -> Tensor:
        return released.loss(task.model, made) if way == RELEASED[0] else released.one_row(task.model, made, first)

    turns, clock = Turns(len(targets), 0), Watched(torch.device("cpu"))
    turns_of(task)
    Turns.forward = staticmethod(lambda wanted: of(batch(wanted)))
    peer = Published(task.model, LR, EPS)
    while True:
        made = batch(turns.draw(0))

        def closure() -> Tensor:
            with clock.measure("forwards"):
                return of(made)  # noqa: B023

        with clock.measure("step"):
            peer.step(closure)


def main() -> None:
    order = hear()
    options = Options(**order["options"], lr=LR, eps=EPS)
    with contextlib.redirect_stdout(sys.stderr):
        if order["way"] in RELEASED:
            looped(options, order["way"])
        else:
            tuned(options)


if __name__ == "__main__":
    main()

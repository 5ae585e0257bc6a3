"""A run that broke off goes on: weights and step from the journal, lines of metrics.jsonl as if nothing had happened."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch

from zokern import ZokernWarning, journal
from zokern.finetune import former, identity, records
from zokern.finetune.loop import Begun, factor
from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.output import Output
from zokern.finetune.ranks import Team
from zokern.finetune.samples import look
from zokern.finetune.tasks import Task, evaluate
from zokern.journal import tools
from zokern.optim import ZerothOrderOptimizer

ENDED = ": all its steps are done; for more give --steps"


def check(output: Output, options: Options) -> None:
    """Raises FinetuneError, before anything is loaded, where there is nothing to go on from."""
    if not options.journal:
        raise FinetuneError(
            f"--resume: the run in {output.directory} was made with --no-journal, so there is nothing to go on from; begin "
            "it again with --force"
        )
    if not output.journal.is_file() or output.journal.stat().st_size == 0:
        again = "with --force" if former.valuable(output.directory) else "without --resume"
        raise FinetuneError(
            f"--resume: {output.journal} is missing or empty, so there is nothing to go on from; begin again {again}"
        )


def go_on(
    task: Task,
    optimizer: ZerothOrderOptimizer,
    found: identity.Stored,
    output: Output,
    stack: contextlib.ExitStack,
    say: Callable[[str, str], None],
    team: Team,
) -> Begun:
    """Takes up the run whose journal is in `output`, and writes on; `stack` ends that. On every rank: the first one has the
    files."""
    options = found.options
    before = team.from_first(lambda: _before(task, optimizer, options, output))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = stack.enter_context(journal.resume(optimizer, output.journal))
    for warning in told:
        if issubclass(warning.category, ZokernWarning):
            say("", str(warning.message))
    if done > options.steps:
        raise FinetuneError(
            f"--resume: --steps is {options.steps} in options.json, and {done} are done; put at least that there"
        )
    begun, forwards, output.records = team.from_first(lambda: _look_back(optimizer, found, output, before, done, say))
    optimizer.set_counters({**optimizer.counters, "forwards": forwards})
    return begun


def _before(task: Task, optimizer: ZerothOrderOptimizer, options: Options, output: Output) -> records.Record | None:
    """The evaluation before the first step, where it is lost, while the weights are those of the start."""
    output.look_back()
    if any(record["kind"] == "eval" and record["step"] == 0 for record in output.records):
        return None
    return _evaluated(task, optimizer, options)


def _look_back(
    optimizer: ZerothOrderOptimizer,
    found: identity.Stored,
    output: Output,
    before: records.Record | None,
    done: int,
    say: Callable[[str, str], None],
) -> tuple[Begun, int, list[records.Record]]:
    """Where the run is, how many forwards it has had, and its lines, which are written again."""
    options = found.options
    kept = records.kept(output.records, options, done, found.ends)
    if before is not None:
        kept.insert(0, before)
    each = optimizer.forwards() * options.accumulate
    last = max(kept, key=lambda record: record["step"])
    forwards = last["forwards"] + (done - last["step"]) * each
    passed = tools.summary(output.journal)
    losses = dict(zip(passed["steps"], passed["loss"], strict=True))
    lost = kept
    kept = _completed(kept, optimizer, found, losses, dict(zip(passed["steps"], passed["lr"], strict=True)), done)
    for what in _lost(lost, kept, options, done):
        say("", f"{output.directory / 'metrics.jsonl'}: {what}")
    since = max((record["step"] for record in kept if record["kind"] == "train"), default=0)
    output.go_on(kept, identity.file(found))
    say("resumed", f"at step {done} of {options.steps}" + ("" if done < options.steps else ENDED))
    if found.grown and options.lr_schedule != "constant":
        rate, old = float(optimizer.param_groups[0]["lr"]), found.ends[-1]
        was, now = (rate * factor(options.lr_schedule, options.warmup_steps, n)(done) for n in (old, options.steps))
        say(
            "",
            f"--steps grows from {old} to {options.steps}: from here on the {options.lr_schedule} schedule is that of "
            f"{options.steps} steps, and the next step has lr {now:g} in place of {was:g}; the steps done keep theirs",
        )
    return Begun(done, [losses[step] for step in range(since, done) if step in losses]), forwards, output.records


def _lost(before: list[records.Record], after: list[records.Record], options: Options, done: int) -> Iterator[str]:
    """What a run's lines had no more; the evaluation at `done` is made again."""
    if made := len(after) - len(before):
        yield f"{made} lines of training were lost; they are made from the journal, without their projected gradient"
    there = {record["step"] for record in before if record["kind"] == "eval"}
    if gone := [step for step in range(done) if records.planned("eval", step, options) and step not in there]:
        yield f"{len(gone)} evaluations were lost, the first after step {gone[0]}"


def _completed(
    kept: list[records.Record],
    optimizer: ZerothOrderOptimizer,
    found: identity.Stored,
    losses: dict[int, float],
    rates: dict[int, float],
    done: int,
) -> list[records.Record]:
    """With the lines of training that were lost, or that a full disk kept out, made from the journal. It does not have
    their projected gradient, which is null there."""
    options, sign = found.options, -1.0 if optimizer.maximize else 1.0
    train = {record["step"]: record for record in kept if record["kind"] == "train"}
    added, last, seconds = [], 0, 0.0
    for step in range(1, done + 1):
        if not (step in found.ends or records.planned("train", step, options)):
            continue
        if step in train:
            last, seconds = step, train[step]["seconds"]
            continue
        window = torch.tensor([losses.get(i, float("nan")) for i in range(last, step)])
        finite = window[window.isfinite()]
        added.append(records.plain({
            "kind": "train", "step": step, "loss": sign * finite.mean().item() if len(finite) else float("nan"),
            "skipped": sum(not math.isfinite(losses.get(i, 0.0)) for i in range(step)), "projected_gradient": None,
            "lr": rates.get(step - 1, float("nan")), "eps": float(optimizer.param_groups[0]["eps"]),
            "seconds": seconds, "forwards": step * optimizer.forwards() * options.accumulate,
        }))  # fmt: skip
        last = step
    return sorted([*kept, *added], key=lambda record: (record["step"], record["kind"] == "eval"))


def _evaluated(task: Task, optimizer: ZerothOrderOptimizer, options: Options) -> records.Record:
    """The line of the evaluation before the first step, made again."""
    with torch.no_grad():
        accuracy, loss = evaluate(task, "eval", options.eval_batch_size)
        said = look(task)
    group = optimizer.param_groups[0]
    rate = float(group["lr"]) * factor(options.lr_schedule, options.warmup_steps, options.steps)(0)
    return records.plain({
        "kind": "eval", "step": 0, "loss": loss, **records.scored(task.metric.name, accuracy), "samples": said, "lr": rate,
        "eps": float(group["eps"]), "seconds": 0.0, "forwards": 0,
    })  # fmt: skip

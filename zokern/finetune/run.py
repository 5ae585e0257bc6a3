"""One fine-tuning run from its options to its files: check, load, train, save, summarise."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from rich.console import Console

from zokern import journal
from zokern.distributed.exchange import RankError
from zokern.finetune import (
    adapted,
    adapter_about,
    adapters,
    between,
    choosing,
    display,
    examples,
    failures,
    identity,
    images,
    launching,
    learnt,
    methods,
    models,
    plots,
    preset,
    prompted,
    resuming,
    samples,
    surroundings,
    unused,
    virtual,
)
from zokern.finetune import data as texts
from zokern.finetune.checkpoints import longest
from zokern.finetune.clock import peak_memory
from zokern.finetune.display import Display, Shown, clock, percent
from zokern.finetune.elsewhere import Elsewhere
from zokern.finetune.loop import Result, train
from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.output import Output, claim
from zokern.finetune.ranks import Team
from zokern.finetune.records import Record
from zokern.finetune.similar import Similarity
from zokern.finetune.stopping import Stop, Stopped
from zokern.finetune.tasks import Classifier, Task, choose_packing, cut_notes
from zokern.journal import tools as journal_tools
from zokern.optim import ZerothOrderOptimizer, rate
from zokern.optim.causes import announce_quantised
from zokern.report import versions
from zokern.tasks.metrics import named

_PACKAGES = ("zokern", "torch", "transformers", "datasets", "tokenizers", "numpy")


@dataclasses.dataclass
class Summary:
    """The result of a run, with what was chosen for its `auto` options. memory: peak, in bytes. counters: "steps" and
    "forwards" of the whole run, the others since step `result.since`."""

    result: Result
    objective: str
    device: str
    dtype: str
    parameters: int
    memory: int
    counters: dict[str, int]
    skipped: int
    model: str
    output: Output
    stopped: int | None = None  # the signal that came
    adapter: bool = False  # what was trained, and saved alone
    metric: str = "accuracy"  # what result.accuracy is
    packed: bool = False  # whether the texts of a batch were
    ranks: int = 1  # processes that trained together
    # Some of the held-out texts, and what was said.
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    far: rate.Far | None = None  # where lr is far from the rule's
    better: Record | None = None  # an evaluation in between that was clearly better than the last one

    @property
    def code(self) -> int:
        """The command's exit code: 128 and the signal's number, 1 where the journal was lost, 0."""
        if self.stopped is not None or self.result.interrupted:
            return 128 + (self.stopped or signal.SIGINT)
        return int(self.output.incomplete)

    @property
    def gained(self) -> float:
        """Held-out accuracy, or what `metric` names, after minus before, in points (per cent)."""
        return 100 * (self.result.accuracy[1] - self.result.accuracy[0])


def run(
    options: Options,
    console: Console | None = None,
    *,
    resume: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Summary:
    """Fine-tune as `options` say. Raises FinetuneError for what the user can mend.

    Ctrl-C, SIGTERM and SIGHUP end it early, saved; where there is nothing to save, or at a second Ctrl-C, Stopped is
    raised, a KeyboardInterrupt that says what there is.

    resume: the run in options.output, which broke off, goes on with the same bits, and with its own options. given: those
    that the user has set besides; they have to be the same, but that steps may be more.

    Of several ranks each one calls it. The first one prints and writes; all return.
    """
    if not resume:
        launching.check(options)
    with surroundings.kept(), Stop().installed() as stop, launching.joined(options.device) as team:
        console = console or Console(file=cast(IO[str], Shown(sys.stdout)), quiet=not team.first)
        models.import_transformers()
        plots.require()
        if not resume:
            team.check(options)
        return _in_output(options, console, stop, team, resume, given)


def _in_output(
    options: Options, console: Console, stop: Stop, team: Team, resume: bool, given: Mapping[str, Any] | None
) -> Summary:
    with contextlib.ExitStack() as stack:
        places: list[Output] = []

        def begin() -> None:
            if resume and not options.output.is_dir():
                raise FinetuneError(
                    f"--resume: {options.output / 'options.json'} cannot be read (there is no such directory); give the "
                    "--output of a run"
                )
            say = functools.partial(display.say, console)
            places.append(stack.enter_context(claim(options.output, force=options.force, resume=resume, say=say)))

        team.from_first(begin)  # on the first rank alone
        output = places[0] if team.first else Elsewhere(options.output)
        output.start = team.start
        return _Run(options, console, output, stop, team).guarded(resume, given)


class Loaded(NamedTuple):
    """What a run has before its first step. about: for the journal."""

    task: Task
    tokenizer: Any
    optimizer: ZerothOrderOptimizer
    data: texts.Data
    about: dict[str, Any]


def load(options: Options, say: Callable[[str, str], None], team: Team | None = None) -> Loaded:
    """Model, data and optimizer of a run. Nothing is written. say: prints a line under a name: what was chosen. team: the
    ranks, of which each has its own device."""
    team = team or Team()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    asked, options = options, preset.applied(options)
    device = models.choose_device(team.local(options.device))
    if team.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    config = models.load_config(options.model)
    dtype = models.choose_dtype(options.dtype, config, device)
    objective, reason = options.objective, "as asked for"
    if objective == "auto":
        objective, reason = choosing.objective(config, options)
    choosing.check(objective, config)
    options = preset.for_objective(dataclasses.replace(options, objective=objective))
    if options.adapter is not None and (unfit := adapters.unfit(options.adapter, objective)):
        raise FinetuneError(unfit)
    examples.check(options)
    with failures.telling(f"--data {options.data!r} cannot be read", "see to it that the file can be read"):
        data = texts.load(options, getattr(config, "label2id", None), head=choosing.has_head(objective, config))
    task, tokenizer = _task(options, data, config, dtype, device)
    if options.metric is not None:
        task.measure(named(options.metric))
    task.by_metric = options.minimise == "metric"
    for name, part in (("train", data.train), ("eval", data.eval)):
        task.add(name, part)
    if (padded := choose_packing(task, options.packing)) is not None:
        data.notes.append(f"texts are padded (--packing {options.packing}): {padded}")
    data.notes += unused.notes(asked, options)
    data.notes += cut_notes(task, longest(task.model, tokenizer) - virtual.room(task.model)) if task.cuts else []
    left_out: list[str] = []
    announce_quantised(task.model, left_out.append)  # here, and not by the optimizer too
    try:
        optimizer = methods.build(task.model, options)
    except (TypeError, ValueError) as error:
        raise FinetuneError(str(error)) from error
    about = {"model": options.model, "objective": objective, "labels": data.labels, "dtype": _name(dtype),
             "seed": options.seed, **adapter_about.about(task.model, options)}  # fmt: skip
    where = f"{_name(dtype)} on {device}"
    say("model", f"{options.model}: {config.model_type}, {_size(task) / 1e6:,.1f} million parameters, {where}")
    if adapted.is_adapted(task.model):
        say("adapter", adapter_about.said(task.model, options))
    for note in left_out:
        say("", note)
    classes = f", {len(data.labels)} labels" if data.labels else ""
    say("data", f"{data.source}: {len(data.train)} {_things(options)}, {len(data.eval)} held out" + classes)
    for note in data.notes:
        say("", note)
    aim = f", minus {task.metric.name} is minimised" if task.by_metric else ""
    say("objective", f"{objective} ({reason}){aim}")
    say("method", _method(options, optimizer, adapted.kind_of(task.model)))
    if far := _far(optimizer, options, task):
        say("", far.said())
    if team.size > 1:
        say("ranks", team.described(options))
    say("loaded in", f"{time.perf_counter() - begun:.1f} s")
    return Loaded(task, tokenizer, optimizer, data, about)


def line(console: Console, name: str, value: str) -> None:
    """Prints a value under its name."""
    display.say(console, f"{name:<10}{value}")


def _size(task: Task) -> int:
    """How many numbers the model has, with its adapter; without one, how many are trained."""
    return sum(p.numel() for p in task.model.parameters()) if adapted.is_adapted(task.model) else _tuned(task)


def _far(optimizer: ZerothOrderOptimizer, options: Options, task: Task) -> rate.Far | None:
    return rate.far(optimizer, options.lr, _tuned(task), not adapted.is_adapted(task.model))


def _tuned(task: Task) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in task.model.parameters() if p.requires_grad)


class _Run:
    """One run in its output directory."""

    def __init__(self, options: Options, console: Console, output: Output, stop: Stop, team: Team) -> None:
        self.options, self.console, self.output, self.stop, self.team = options, console, output, stop, team
        self.optimizer: ZerothOrderOptimizer | None = None

    def guarded(self, resume: bool, given: Mapping[str, Any] | None) -> Summary:
        """The run; what goes wrong is told with what there is."""
        try:
            return self._go(resume, given)
        except RankError as error:
            raise FinetuneError(self._what_is_there(self._why(error), resume)) from error
        except KeyboardInterrupt:
            if noted := self.team.noted():  # the launcher ends all where one has failed
                raise FinetuneError(self._what_is_there(noted, resume)) from None
            raise Stopped(self._what_is_there("stopped", resume), self.stop.code) from None
        except journal.JournalError as error:
            if self.output.journaled:
                raise FinetuneError(self._what_is_there(str(error), resume)) from error
            self.output.abandon()
            raise FinetuneError(str(error)) from error
        except FinetuneError:
            self.output.abandon()
            raise
        except Exception as error:
            if (why := failures.reason(error)) is None:
                self.output.abandon()
                raise
            where = f"--output {str(self.output.directory)!r} cannot be written ({why})"
            raise FinetuneError(self._what_is_there(where, resume)) from error

    def _why(self, error: RankError) -> str:
        """What other ranks have said, in the exchange or before they left without one."""
        together = None if self.optimizer is None else self.optimizer._ranks
        told = together is not None and not together.exchange.broken and not together.compared
        return str(error) if told else self.team.noted() or str(error)

    def _what_is_there(self, head: str, resume: bool) -> str:
        """What an error or a signal has left, and the command that goes on."""
        if self.output.abandon() or self.optimizer is None:
            return (
                f"{head}; the run there is as it was" if resume else f"{head} before the first step; nothing was saved"
            )
        saved = f"the model is in {self.output.checkpoint}" if self.output.saved else "the model has not been saved"
        if not self.output.resumable:
            return f"{head}; {saved}, and without a journal the run cannot go on"
        done, steps = _steps_in(self.output.journal), self.options.steps
        rest = "writes the rest in seconds" if done == steps else "goes on from there"
        return f"{head}; {done} of {steps} steps are in {self.output.journal}, {saved}; {rest}: {self.output.again}"

    def _say(self, name: str, value: str) -> None:
        line(self.console, name, value)

    def _go(self, resume: bool, given: Mapping[str, Any] | None) -> Summary:
        say, output, team = self._say, self.output, self.team
        found = identity.Stored(self.options, None, [], ranks=team.size)
        if resume:
            found = self._found(given)
        options = self.options = found.options
        loaded = load(options, say, team)
        task, tokenizer, data, optimizer = loaded.task, loaded.tokenizer, loaded.data, loaded.optimizer
        now = identity.hashes(data, task)
        if any(one != now for one in team.every(now)):
            raise FinetuneError(
                f"the ranks have other texts or tokens, or in another order (--data {options.data!r}); give all of them "
                "the same files"
            )
        if resume and found.hashes is not None:
            identity.compare(found.hashes, now, preset.applied(options))
        self.optimizer = optimizer
        if resume and found.hashes is None:
            say("", "the data could not be compared with the run's: an older zokern wrote its options.json")
        found = dataclasses.replace(found, hashes=now)

        shown = Display(self.console, options.steps, f"zokern finetune, {options.method}", task.metric.name)
        with contextlib.ExitStack() as stack:
            start = None
            if resume:
                start = resuming.go_on(task, optimizer, found, output, stack, say, team)
            else:
                output.begin(identity.file(found))
                if options.journal:
                    stack.enter_context(journal.write(optimizer, output.journal, about=loaded.about))
            if options.journal:
                output.watch_journal()

            def save() -> None:
                stack.close()  # the journal is complete
                output.mend()
                output.save_model(task.model, tokenizer)

            result = train(task, optimizer, options, output, shown, self.stop, save, start, team)
        output.mend()
        about, device = loaded.about, task.device
        summary = Summary(result, about["objective"], str(device), about["dtype"], _tuned(task), peak_memory(device),
                          dict(optimizer.counters), int(optimizer.skipped_steps), options.model, output,
                          self.stop.asked, adapted.is_adapted(task.model), task.metric.name,
                          task.packer is not None, team.size, samples.record(data.eval, *result.samples),
                          _far(optimizer, options, task),
                          between.better(output.records, result, task.metric.name, len(data.eval)))  # fmt: skip
        output.save_json("run.json", _record(options, data, summary))
        title = f"{options.model}, {data.source}: {result.steps} steps of {options.method}"
        try:
            output.save_curves(lambda path: plots.save(path, output.records, title))
        except Exception as error:  # a picture loses nothing
            why = failures.reason(error) or error
            say("", f"warning: curves.png could not be drawn ({why}); metrics.jsonl has its figures")
        output.complete()
        _print(summary, say)
        summary.stopped = self.stop.asked
        if self.stop.asked is not None and not result.interrupted:
            say("", f"{self.stop.name} came when the steps were done; the result is complete")
        return summary

    def _found(self, given: Mapping[str, Any] | None) -> identity.Stored:
        """The run that is to go on, as the first rank's directory has it."""

        def read() -> identity.Stored:
            found = identity.load(self.output.directory, given)
            resuming.check(self.output, found.options)
            return found

        found = self.team.from_first(read)
        self.team.check(found.options, resume=True)
        if found.ranks != self.team.size:
            self._say(
                "",
                f"the run began with {found.ranks} processes and goes on with {self.team.size}: from here on losses may be "
                "rounded otherwise than there",
            )
        return found


def _steps_in(path: Path) -> int:
    """How many steps a journal has."""
    try:
        return len(journal_tools.summary(path)["steps"])
    except journal.JournalError:
        return 0


def _things(options: Options) -> str:
    return "pictures" if options.objective == "image" else "texts"


def _method(options: Options, optimizer: ZerothOrderOptimizer, adapter: str) -> str:
    group = optimizer.param_groups[0]
    settings = f"lr {float(group['lr']):g} {options.lr_schedule}, eps {float(group['eps']):g}"
    chosen = [name for name in ("lr", "eps") if adapter and getattr(options, name) is None]
    if chosen:
        settings += f" ({adapters.said(adapter, chosen, options)})"
    forwards = optimizer.forwards() * options.accumulate
    each = f"{forwards} forwards of {options.batch_size} {_things(options)} a step, no backward"
    return f"{options.method}, {settings}, {each}"


def _task(
    options: Options, data: texts.Data, config: Any, dtype: torch.dtype, device: torch.device
) -> tuple[Task, Any]:
    labels, objective = data.labels, options.objective
    sentences = [data.descriptions.get(label, label) for label in labels]
    words = preset.words(options, labels) or [label.replace("_", " ") for label in labels]
    if options.descriptions is not None:
        with failures.telling("--descriptions cannot be read", "give a JSON file {label: text}"):
            found = texts.read_map(options.descriptions, "--descriptions", labels)
        sentences = [found[label] for label in labels]
    if options.verbalizers is not None:
        with failures.telling("--verbalizers cannot be read", "give a JSON file {label: word}"):
            found = texts.read_map(options.verbalizers, "--verbalizers", labels)
        words = [found[label] for label in labels]
    model, tokenizer = models.load(options, objective, labels, config, dtype)
    models.place(model, device)
    if objective == "image":
        return images.Pictures(model, tokenizer, labels), tokenizer
    length = longest(model, tokenizer) - virtual.room(model)
    if options.max_length > length:
        raise FinetuneError(
            f"--max-length is {options.max_length}; allowed: at most {length} for --model {options.model!r}"
            f"{virtual.beside(model)}"
        )
    if objective == "similarity":
        return Similarity(model, tokenizer, labels, options.max_length, sentences, options.temperature), tokenizer
    if objective == "classifier":
        return Classifier(model, tokenizer, labels, options.max_length, cut=examples.cut_place(options)), tokenizer
    return prompted.task(options, model, tokenizer, labels, words, length), tokenizer


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _record(options: Options, data: texts.Data, summary: Summary) -> dict[str, Any]:
    result = summary.result
    return {
        "command": sys.argv,
        "options": options.as_json(),
        "chosen": {"objective": summary.objective, "device": summary.device, "dtype": summary.dtype,
                   "packed": summary.packed},
        "data": data.record(),
        "versions": versions((*_PACKAGES, "peft") if summary.adapter else _PACKAGES),
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(),
                    "ranks": summary.ranks,
                    "gpu": torch.cuda.get_device_name(summary.device) if summary.device.startswith("cuda") else None},
        "samples": summary.samples,
        "summary": {
            "steps": result.steps,
            "since_step": result.since,
            "interrupted": result.interrupted,
            **_scores(summary),
            "loss_before": result.loss[0],
            "loss_after": result.loss[1],
            "seconds": result.seconds,
            "peak_memory_bytes": summary.memory,
            "parameters": summary.parameters,
            "counters": summary.counters,
            "skipped_steps": summary.skipped,
        },
    }  # fmt: skip


def _scores(summary: Summary) -> dict[str, Any]:
    before, after = summary.result.accuracy
    if summary.metric == "accuracy":
        return {"accuracy_before": before, "accuracy_after": after, "points_gained": summary.gained}
    return {"metric": summary.metric, "score_before": before, "score_after": after, "points_gained": summary.gained}


def _print(summary: Summary, say: Any) -> None:
    result, seconds = summary.result, summary.result.seconds
    inside = max(seconds["forwards"] + seconds["passes"], 1e-9)
    kind = "of the GPU" if summary.device.startswith("cuda") else "of main memory"
    say("", "")
    before, after = (display.measured(summary.metric, value) for value in result.accuracy)
    if summary.metric == "accuracy":
        say("accuracy", f"{before} -> {after} held out ({summary.gained:+.1f} points)")
    else:
        say("held out", f"{summary.metric.replace('_', ' ')} {before} -> {after}")
    say("loss", f"{result.loss[0]:.4f} -> {result.loss[1]:.4f} held out")
    path = summary.output.journal
    replay = f"zokern replay {shlex.quote(summary.model)} {shlex.quote(str(path))}" if path.exists() else None
    if summary.better is not None:  # something was learnt, and more steps are no remedy
        best, again = between.said(summary.better, result, summary.metric, replay)
        say("best", best)
        say("", again)
    elif not result.interrupted and (idle := learnt.not_learnt(result.loss, result.steps, summary.far)):
        say("", idle)
    if summary.far:
        say("", summary.far.said())
    shares = {key: f"{seconds[key]:.1f} s ({percent(seconds[key] / inside)})" for key in ("forwards", "passes")}
    took = f"{clock(seconds['training'])} for {result.steps} steps"
    if summary.samples:
        say("samples", "probability of what is right, before -> after, of some of the held-out texts:")
        for told in samples.lines(summary.samples):
            say("", told)
    since = f"; since step {result.since}" if result.since else ""
    if summary.ranks > 1:
        say("ranks", f"{summary.ranks} processes trained together; times and memory are those of the first")
    say("time", f"{took}{since}: forwards {shares['forwards']}, passes over the weights {shares['passes']}")
    say("", f"evaluations {seconds['evaluations']:.1f} s more")
    say("memory", f"{summary.memory / 2**20:,.0f} MiB {kind} at the peak")
    if summary.skipped:
        say(
            "skipped",
            f"{summary.skipped} steps, as their loss was not finite: lower --lr or --eps, or use --dtype float32",
        )
    say("curves", str(summary.output.curves))
    loads = "PeftModel.from_pretrained" if summary.adapter else "from_pretrained"
    say("model", f"{summary.output.checkpoint} (loads with {loads})")
    if replay is not None:
        size = path.stat().st_size / 1000
        say("journal", f"the whole fine-tune is {path}, {size:,.1f} kB; {replay} -o DIRECTORY makes the model again")
    if result.interrupted and summary.output.resumable:
        say("go on", summary.output.again)

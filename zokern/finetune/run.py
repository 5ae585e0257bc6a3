"""One fine-tuning run from its options to its files: check, load, train, save, summarise."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console

from zokern import ZokernWarning, journal
from zokern.finetune import data as texts
from zokern.finetune import methods, models, plots
from zokern.finetune.checkpoints import longest
from zokern.finetune.clock import peak_memory
from zokern.finetune.display import Display, clock, percent
from zokern.finetune.loop import Result, train
from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.output import Output
from zokern.finetune.prompts import Prompt
from zokern.finetune.tasks import Classifier, Similarity, Task, cut_notes
from zokern.optim import ZerothOrderOptimizer
from zokern.report import versions

_PACKAGES = ("zokern", "torch", "transformers", "datasets", "tokenizers", "numpy")


@dataclasses.dataclass
class Summary:
    """The result of a run, with what was chosen for its `auto` options. memory: peak, in bytes."""

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

    @property
    def gained(self) -> float:
        """Held-out accuracy after minus before, in points (per cent)."""
        return 100 * (self.result.accuracy[1] - self.result.accuracy[0])


class Loaded(NamedTuple):
    """What a run has before its first step. about: for the journal. say: prints a line under a name."""

    task: Task
    tokenizer: Any
    optimizer: ZerothOrderOptimizer
    data: texts.Data
    about: dict[str, Any]
    say: Callable[[str, str], None]


def load(options: Options, console: Console) -> Loaded:
    """Model, data and optimizer of a run, and says what was chosen. Nothing is written."""
    models.import_transformers()
    plots.require()
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    begun = time.perf_counter()
    device = models.choose_device(options.device)
    config = models.load_config(options.model)
    dtype = models.choose_dtype(options.dtype, config, device)
    objective, reason = options.objective, "as asked for"
    if objective == "auto":
        objective, reason = models.choose_objective(config)
    data = texts.load(options, getattr(config, "label2id", None), head=models.has_head(objective, config))
    task, tokenizer = _task(options, objective, data, config, dtype, device)
    for name, part in (("train", data.train), ("eval", data.eval)):
        task.add(name, part)
    data.notes += cut_notes(task, longest(task.model, tokenizer))
    try:
        optimizer = methods.build(task.model, options)
    except (TypeError, ValueError) as error:
        raise FinetuneError(str(error)) from error
    about = {"model": options.model, "objective": objective, "labels": data.labels, "dtype": _name(dtype),
             "seed": options.seed}  # fmt: skip
    tuned = _tuned(task)

    def say(name: str, value: str) -> None:
        console.print(f"{name:<10}{value}", highlight=False, soft_wrap=True, markup=False)

    where = f"{_name(dtype)} on {device}"
    say("model", f"{options.model}: {config.model_type}, {tuned / 1e6:,.1f} million parameters, {where}")
    say("data", f"{data.source}: {len(data.train)} texts, {len(data.eval)} held out, {len(data.labels)} labels")
    for note in data.notes:
        say("", note)
    say("objective", f"{objective} ({reason})")
    say("method", _method(options, optimizer))
    say("loaded in", f"{time.perf_counter() - begun:.1f} s")
    return Loaded(task, tokenizer, optimizer, data, about, say)


def _tuned(task: Task) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in task.model.parameters() if p.requires_grad)


def run(options: Options, console: Console | None = None, *, resume: bool = False) -> Summary:
    """Fine-tune as `options` say. Raises FinetuneError for what the user can mend; Ctrl-C ends it early, saved.

    resume: options are those that a run which broke off left in its output directory; it goes on with the same bits.
    """
    console = console or Console()
    if not resume:
        options.check()
    task, tokenizer, optimizer, data, about, say = load(options, console)
    display = Display(console, options.steps, f"zokern finetune, {options.method}")
    with contextlib.ExitStack() as stack:
        output, done = _open(options, optimizer, about, resume, stack)
        if resume:
            say("resumed", f"at step {done} of {options.steps}")
        result = train(task, optimizer, options, output, display, done)
    output.save_model(task.model, tokenizer)
    output.close()
    plots.save(
        output.curves, output.records, f"{options.model}, {data.source}: {result.steps} steps of {options.method}"
    )
    summary = Summary(result, about["objective"], str(task.device), about["dtype"], _tuned(task), peak_memory(task.device),
                      dict(optimizer.counters), int(optimizer.skipped_steps), options.model, output)  # fmt: skip
    output.save_json("run.json", _record(options, data, summary))
    _print(summary, say)
    return summary


def _method(options: Options, optimizer: ZerothOrderOptimizer) -> str:
    settings = f"lr {float(optimizer.param_groups[0]['lr']):g} {options.lr_schedule}, eps {options.eps:g}"
    forwards = optimizer.forwards() * options.accumulate
    each = f"{forwards} forwards of {options.batch_size} texts a step, no backward"
    return f"{options.method}, {settings}, {each}"


def _open(
    options: Options, optimizer: Any, about: dict[str, Any], resume: bool, stack: contextlib.ExitStack
) -> tuple[Output, int]:
    """The output directory and the journal in it; how many steps are done."""
    path = options.output / "journal.zkj"
    try:
        if resume:
            with warnings.catch_warnings():  # a record that was cut off is what a killed run leaves
                warnings.simplefilter("ignore", ZokernWarning)
                done = stack.enter_context(journal.resume(optimizer, path))
            return Output(options.output, resumed_at=done), done
        output = Output(options.output)
        output.save_json("options.json", options.as_json())
        if options.journal:
            stack.enter_context(journal.write(optimizer, path, about=about))
        return output, 0
    except journal.JournalError as error:
        raise FinetuneError(str(error)) from error


def _task(
    options: Options, objective: str, data: texts.Data, config: Any, dtype: torch.dtype, device: torch.device
) -> tuple[Task, Any]:
    labels = data.labels
    sentences = [data.descriptions.get(label, label) for label in labels]
    words = [label.replace("_", " ") for label in labels]
    if options.descriptions is not None:
        found = texts.read_map(options.descriptions, "--descriptions", labels)
        sentences = [found[label] for label in labels]
    if options.verbalizers is not None:
        found = texts.read_map(options.verbalizers, "--verbalizers", labels)
        words = [found[label] for label in labels]
    model, tokenizer = models.load(options, objective, labels, config, dtype)
    models.place(model, device)
    length = longest(model, tokenizer)
    if options.max_length > length:
        raise FinetuneError(
            f"--max-length is {options.max_length}; allowed: at most {length} for --model {options.model!r}"
        )
    if objective == "similarity":
        return Similarity(model, tokenizer, labels, options.max_length, sentences, options.temperature), tokenizer
    if objective == "prompt":
        prompt = Prompt(
            model, tokenizer, labels, options.max_length, options.template, words, space=options.space, limit=length
        )
        return prompt, tokenizer
    return Classifier(model, tokenizer, labels, options.max_length), tokenizer


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _record(options: Options, data: texts.Data, summary: Summary) -> dict[str, Any]:
    result = summary.result
    return {
        "command": sys.argv,
        "options": options.as_json(),
        "chosen": {"objective": summary.objective, "device": summary.device, "dtype": summary.dtype},
        "data": data.record(),
        "versions": versions(_PACKAGES),
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(),
                    "gpu": torch.cuda.get_device_name(summary.device) if summary.device.startswith("cuda") else None},
        "summary": {
            "steps": result.steps,
            "interrupted": result.interrupted,
            "accuracy_before": result.accuracy[0],
            "accuracy_after": result.accuracy[1],
            "points_gained": summary.gained,
            "loss_before": result.loss[0],
            "loss_after": result.loss[1],
            "seconds": result.seconds,
            "peak_memory_bytes": summary.memory,
            "parameters": summary.parameters,
            "counters": summary.counters,
            "skipped_steps": summary.skipped,
        },
    }  # fmt: skip


def _print(summary: Summary, say: Any) -> None:
    result, seconds = summary.result, summary.result.seconds
    inside = max(seconds["forwards"] + seconds["passes"], 1e-9)
    kind = "of the GPU" if summary.device.startswith("cuda") else "of main memory"
    say("", "")
    say(
        "accuracy",
        f"{percent(result.accuracy[0])} -> {percent(result.accuracy[1])} held out ({summary.gained:+.1f} points)",
    )
    say("loss", f"{result.loss[0]:.4f} -> {result.loss[1]:.4f} held out")
    shares = {key: f"{seconds[key]:.1f} s ({percent(seconds[key] / inside)})" for key in ("forwards", "passes")}
    took = f"{clock(seconds['training'])} for {result.steps} steps"
    say("time", f"{took}: forwards {shares['forwards']}, passes over the weights {shares['passes']}")
    say("", f"evaluations {seconds['evaluations']:.1f} s more")
    say("memory", f"{summary.memory / 2**20:,.0f} MiB {kind} at the peak")
    if summary.skipped:
        say(
            "skipped",
            f"{summary.skipped} steps, as their loss was not finite: lower --lr or --eps, or use --dtype float32",
        )
    say("curves", str(summary.output.curves))
    say("model", f"{summary.output.checkpoint} (loads with from_pretrained)")
    path = summary.output.journal
    if path.exists():
        size = path.stat().st_size / 1000
        again = f"zokern replay {summary.model} {path} -o DIRECTORY"
        say("journal", f"the whole fine-tune is {path}, {size:,.1f} kB; {again} makes the model again")

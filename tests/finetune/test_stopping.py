"""Signals end a run saved, and what is said then is true; a full disk is a sentence; the caller's settings stay."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from typer.testing import CliRunner  # noqa: E402

from tests.finetune.calling import at_call  # noqa: E402
from tests.finetune.test_finetune import command, models_dir, options, records, table, tensors  # noqa: E402, F401
from tests.finetune.test_resuming import alike, finished, no_pictures, resume, whole  # noqa: E402, F401
from zokern import ZokernWarning, drawing  # noqa: E402
from zokern.cli import app  # noqa: E402
from zokern.finetune import Options, failures, finetune, output, plots, stopping, tasks  # noqa: E402

draw = plots.save  # which a fixture replaces
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def given(options: Options) -> list[str]:
    """The command line of a run."""
    names = (
        "model",
        "data",
        "output",
        "steps",
        "batch_size",
        "log_every",
        "eval_every",
        "lr",
        "max_length",
        "device",
        "threads",
    )
    return ["finetune", *(str(x) for name in names for x in ("--" + name.replace("_", "-"), getattr(options, name)))]


def signalled(where: tuple[object, str], at: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives in the at-th call of a function."""
    at_call(where, at, lambda: signal.raise_signal(number), monkeypatch)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_step_ends_a_run_saved(
    number: int,
    whole: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, before = dataclasses.replace(whole, output=tmp_path / "the half"), signal.getsignal(number)
    with monkeypatch.context() as patch:
        signalled((tasks.Task, "loss"), 11, number, patch)
        code, said = command(*given(half))
    assert code == SIGNALS[number], said
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert f"stopped by {name} after 5 steps; saving" in said
    assert "accuracy" in said
    assert json.loads((half.output / "run.json").read_text())["summary"]["interrupted"] is True
    transformers.AutoModelForSequenceClassification.from_pretrained(half.output / "checkpoint")
    assert signal.getsignal(number) is before
    again = shlex.split(re.findall(r"^go on +zokern (finetune .*)$", said, re.MULTILINE)[0])
    code, said = command(*again)
    assert (code, "go on" in said) == (0, False), said
    alike(half.output, whole.output)


@pytest.mark.parametrize(
    ("where", "at", "message"),
    [
        ("load", 1, "stopped before the first step; nothing was saved"),
        ("evaluate", 1, "stopped before the first step; nothing was saved"),
        ("loss", 1, "stopped before the first step; nothing was saved"),
    ],
)
def test_a_signal_before_the_first_step_leaves_nothing(
    where: str,
    at: int,
    message: str,
    whole: Options,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zokern.finetune import data, loop

    places = {"load": (data, "load"), "evaluate": (loop, "evaluate"), "loss": (tasks.Task, "loss")}
    old = (whole.output / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        signalled(places[where], at, signal.SIGTERM, patch)
        code, said = command(*given(whole), "--force")
    assert (code, message in said) == (143, True), said
    assert (whole.output / "run.json").read_bytes() == old
    assert len(list(whole.output.iterdir())) == 6
    fresh = dataclasses.replace(whole, output=whole.output.parent / "fresh")
    with monkeypatch.context() as patch:
        signalled(places[where], at, signal.SIGINT, patch)
        code, said = command(*given(fresh))
    assert (code, message in said) == (130, True), said
    assert not fresh.output.exists()


def test_ctrl_c_while_the_result_is_written_lets_it_be_written(
    whole: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = dataclasses.replace(whole, output=tmp_path / "half")
    with monkeypatch.context() as patch:
        signalled((output.Output, "save_json"), 2, signal.SIGINT, patch)  # run.json
        code, said = command(*given(half))
    assert (code, "Ctrl-C came when the steps were done; the result is complete" in said) == (130, True), said
    alike(half.output, whole.output)


def test_a_second_ctrl_c_says_what_there_is(whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M7: all steps are done and in the journal; what is said is true, and its advice works."""
    half = dataclasses.replace(whole, output=tmp_path / "half way")

    def twice(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(output, "replacing", twice)
        code, said = command(*given(half))
    said = said.replace("\n", " ")
    assert code == 130
    assert f"stopped; 8 of 8 steps are in {half.output / 'journal.zkj'}, the model has not been saved" in said
    advice = f"zokern finetune --resume --output '{half.output}'"
    assert f"writes the rest in seconds: {advice}" in said
    assert command(*shlex.split(advice)[1:])[0] == 0
    alike(half.output, whole.output)


def test_signals_that_systems_repeat_change_nothing(
    whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, plain = dataclasses.replace(whole, output=tmp_path / "half"), output.Output.save_model

    def save(self: output.Output, *arguments: object) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        plain(self, *arguments)

    monkeypatch.setattr(output.Output, "save_model", save)
    code, said = command(*given(half))
    assert (code, (half.output / "run.json").exists()) == (143, True), said
    one, two = (tensors(at / "checkpoint") for at in (half.output, whole.output))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_output_that_is_removed_in_mid_run_is_written_again(
    whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = dataclasses.replace(whole, output=tmp_path / "half")
    with monkeypatch.context() as patch:
        at_call((tasks.Task, "loss"), 9, lambda: shutil.rmtree(half.output), patch)
        code, said = command(*given(half))
    assert (code, said.count("warning: "), "is no longer the directory" in said) == (0, 1, True), said
    alike(half.output, whole.output)
    code, said = command("replay", half.model, half.output / "journal.zkj", "-o", tmp_path / "again")
    assert code == 0, said
    one, two = tensors(half.output / "checkpoint"), tensors(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
    resume(half)


def test_ctrl_c_in_a_replay_says_what_is_there(whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zokern.finetune import rebuild

    line = ["replay", whole.model, whole.output / "journal.zkj", "-o", tmp_path / "new"]
    with monkeypatch.context() as patch:
        patch.setattr(rebuild, "replay", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        code, said = command(*line)
    assert (code, "new is as it was" in said.replace("\n", " ")) == (130, True), said
    assert not (tmp_path / "new").exists()


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.Stop().installed() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.asked is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# -------------------------------------------------------------------------------------------------------------- full disks


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def full(name: str) -> Callable[[Callable[[pytest.MonkeyPatch], None]], None]:
    def add(patch: Callable[[pytest.MonkeyPatch], None]) -> None:
        FULL[name] = patch

    return add


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@full("options.json")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(output.Output, "save_options", no_space)


@full("metrics.jsonl")
def _(patch: pytest.MonkeyPatch) -> None:
    plain = output.Output.log

    def log(self: output.Output, record: dict) -> None:
        if record["step"] >= 3:
            no_space()
        plain(self, record)

    patch.setattr(output.Output, "log", log)


@full("journal.zkj")
def _(patch: pytest.MonkeyPatch) -> None:
    from zokern.journal.format import Writer

    plain, calls = Writer.append, [0]

    def append(self: Writer, body: bytes) -> None:
        calls[0] += 1
        if calls[0] > 6:
            no_space()
        plain(self, body)

    patch.setattr(Writer, "append", append)


@full("checkpoint")
def _(patch: pytest.MonkeyPatch) -> None:
    import safetensors

    def fail(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    patch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)


@full("run.json")
def _(patch: pytest.MonkeyPatch) -> None:
    plain = output.Output.save_json

    def save(self: output.Output, name: str, value: dict) -> None:
        if name == "run.json":
            no_space()
        plain(self, name, value)

    patch.setattr(output.Output, "save_json", save)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("Error while serializing: I/O error: File too large (os error 27)\nmore",
         "Error while serializing: I/O error: File too large (os error 27)"),
        ('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
         "No space left on device"),  # safetensors before 0.6
        ("Error while deserializing header", None),
    ],
)  # fmt: skip
def test_what_the_system_told_a_library(said: str, why: str | None) -> None:
    assert failures.reason(RuntimeError(said)) == why


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_after_it(
    name: str,
    whole: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = dataclasses.replace(whole, output=tmp_path / "half")
    with monkeypatch.context() as patch:
        FULL[name](patch)
        code, said = command(*given(half))
    assert (code, "Traceback" in said) == (1, False), said
    error = said[said.index("error: ") :].splitlines()[0]
    assert error.startswith(f"error: --output {str(half.output)!r} cannot be written (")
    advice = f"zokern finetune --resume --output {half.output}"
    assert (advice in error) == (name != "options.json"), error
    if name == "options.json":
        assert not half.output.exists()
        return
    resume(half)
    if name != "metrics.jsonl":
        alike(half.output, whole.output)
        return
    mine, theirs = records(half.output), records(whole.output)  # from the journal, which has all but one figure
    assert mine[1]["projected_gradient"] is None
    unlike = ("seconds", "projected_gradient", "lr")
    mine, theirs = ([{k: v for k, v in line.items() if k not in unlike} for line in each] for each in (mine, theirs))
    assert mine == theirs


def test_a_picture_that_fails_is_a_warning(whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = dataclasses.replace(whole, output=tmp_path / "half", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", no_space)
        code, said = command(*given(half))
    assert (code, "warning: curves.png could not be drawn (No space left on device)" in said) == (0, True), said
    assert (half.output / "run.json").exists()
    assert not (half.output / "curves.png").exists()


# ------------------------------------------------------------------------------------------------------------ surroundings


@pytest.mark.parametrize("title", ["prices_$5_vs_$10.csv", "$x^{", "\udcff.csv", "a\\b_{", "日本"])
@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.usefixtures("drawn")
def test_a_title_is_text(title: str, tmp_path: Path) -> None:
    draw(tmp_path / "a.png", [{"kind": "eval", "step": 0, "loss": None, "accuracy": 0.5}], title)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    figure = drawing.figure()
    text = figure.suptitle("")
    drawing.plain(text, title)
    assert text.get_text() == title.encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize(("backend", "after"), [("module://not_here.backend_inline", None), ("svg", "svg")])
def test_a_notebooks_backend_stops_nothing_and_stays(backend: str, after: str | None) -> None:
    code = (
        "import os\nfrom zokern import drawing\nfigure = drawing.figure()\n"
        "figure.subplots().plot([1, 2])\nfigure.savefig(os.devnull, format='png')\n"
        "import matplotlib\nprint(os.environ.get('MPLBACKEND'), '|', dict.__getitem__(matplotlib.rcParams, 'backend'))"
    )
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    variable, setting = done.stdout.strip("\n").split(" | ")
    assert variable == backend
    assert after is None or setting == after


def test_the_callers_settings_stay(options: Options, tmp_path: Path) -> None:
    from transformers.utils import logging

    def settings() -> tuple:
        return (
            logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads(), list(warnings.filters),
            [signal.getsignal(number) for number in SIGNALS], torch.is_grad_enabled(), os.environ.get("MPLBACKEND"),
        )  # fmt: skip

    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        before = settings()
        inner = tasks.Task.loss

        def nested(self: tasks.Task, batch: object) -> torch.Tensor:
            with pytest.MonkeyPatch.context() as patch:  # a run inside a run
                patch.setattr(tasks.Task, "loss", inner)
                if not (tmp_path / "inner").exists():
                    finetune(dataclasses.replace(options, output=tmp_path / "inner", steps=1, threads=3))
            return inner(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tasks.Task, "loss", nested)
            finetune(dataclasses.replace(options, output=tmp_path / "outer", steps=2, threads=2))
        assert settings() == before
        with pytest.raises(ValueError):
            finetune(dataclasses.replace(options, output=tmp_path / "bad", model=str(tmp_path)))
        assert settings() == before
    finally:
        logging.set_verbosity_warning()


def test_runs_may_overlap_in_threads(options: Options, tmp_path: Path) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), torch.get_num_threads(), list(warnings.filters))
    first = threading.Thread(target=finetune, args=[dataclasses.replace(options, output=tmp_path / "1", steps=2)])
    second = threading.Thread(target=finetune, args=[dataclasses.replace(options, output=tmp_path / "2", steps=6)])
    first.start()
    second.start()
    first.join()
    second.join()
    assert (logging.get_verbosity(), torch.get_num_threads(), list(warnings.filters)) == before
    assert tensors(tmp_path / "2" / "checkpoint")


def test_models_are_loaded_in_turn(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads at once would leave transformers without tied weights for the whole process."""
    import transformers

    plain, tie = transformers.BertForSequenceClassification.from_pretrained, transformers.PreTrainedModel.tie_weights
    inside, most = [0], [0]

    def load(*args: object, **named: object) -> object:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.2)
        inside[0] -= 1
        return plain(*args, **named)

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", load)
    runs = [dataclasses.replace(options, output=tmp_path / str(i), steps=1) for i in range(2)]
    threads = [threading.Thread(target=finetune, args=[run]) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert transformers.PreTrainedModel.tie_weights is tie


def test_other_warnings_of_a_run_are_not_swallowed(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tasks.Task.loss

    def loss(self: tasks.Task, batch: object) -> torch.Tensor:
        warnings.warn("something that the user should know", ZokernWarning, stacklevel=1)
        return plain(self, batch)

    monkeypatch.setattr(tasks.Task, "loss", loss)
    with pytest.raises(ZokernWarning, match="should know"):  # the suite makes them errors
        finetune(dataclasses.replace(options, steps=1))


def test_an_encoding_without_the_characters_stops_nothing(models_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "daten_é_$1_$2.csv"
    path.write_text(
        "text,label\n" + "".join(f"the {i},{'né' if i % 2 else 'ja'}\n" for i in range(20)), encoding="utf-8"
    )
    line = (
        f"finetune --model {models_dir / 'classifier'} --data {path} --steps 2 --eval-every 0 --device cpu --threads 1"
    )
    done = CliRunner(charset="ascii").invoke(app, [*line.split(), "--output", str(tmp_path / "aus é")])
    assert done.exit_code == 0, done.output
    assert "\\xe9" in done.output
    assert "warning" not in done.output
    assert (tmp_path / "aus é" / "curves.png").exists()


def test_a_terminal_that_has_gone_does_not_stop_a_run() -> None:
    from zokern.finetune.display import Shown

    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as stream:
        os.close(reading)
        shown = Shown(stream)
        for _ in range(3):
            shown.write("a line\n")
            shown.flush()
        with pytest.raises(OSError):
            stream.write("a line\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)

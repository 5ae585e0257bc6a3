"""`zokern finetune --resume`: what it compares, what it refuses, and that it ends with what an undisturbed run has."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tests.finetune.calling import at_call  # noqa: E402
from tests.finetune.test_finetune import command, models_dir, options, records, table, tensors  # noqa: E402, F401
from zokern.finetune import FinetuneError, Options, finetune, identity, plots, tasks  # noqa: E402
from zokern.finetune import records as lines  # noqa: E402


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are half the time of a small run."""
    monkeypatch.setattr(plots, "save", lambda path, *_: path.write_bytes(b"\x89PNG\r\n\x1a\n"))


def alike(a: Path, b: Path, but: Sequence[str] = ("seconds",)) -> None:
    """The weights and, but for the times, the metrics of two runs."""
    one, two = tensors(a / "checkpoint"), tensors(b / "checkpoint")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = ([{k: v for k, v in line.items() if k not in but} for line in records(at)] for at in (a, b))
    assert first == second


def broken(options: Options, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that breaks off in the forward after so many steps."""

    def out_of_memory() -> None:
        raise MemoryError("in a forward")

    with monkeypatch.context() as patch:
        at_call((tasks.Task, "loss"), 2 * steps * options.accumulate + 2, out_of_memory, patch)
        with pytest.raises(MemoryError):
            finetune(options)


def resume(options: Options, *more: object) -> str:
    code, said = command("finetune", "--resume", "--output", options.output, *more)
    assert code == 0, said
    return said


def refused(options: Options, *more: object) -> str:
    code, said = command("finetune", "--resume", "--output", options.output, *more)
    assert code == 1, said
    assert "error: --resume" in said, said
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def finished(models_dir: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A run of 8 steps, with lines at 3, 6, 8 and evaluations at 0, 4, 8."""
    options = Options(
        model=str(models_dir / "classifier"), data=str(table), output=tmp_path_factory.mktemp("finished") / "whole",
        steps=8, batch_size=8, log_every=3, eval_every=4, lr=1e-3, max_length=32, device="cpu", threads=1,
    )  # fmt: skip
    finetune(options)
    return options


@pytest.fixture
def whole(finished: Options, tmp_path: Path) -> Options:
    """A copy of it that a test may spoil."""
    shutil.copytree(finished.output, tmp_path / "whole")
    return dataclasses.replace(finished, output=tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("steps", [1, 4, 5, 7])
def test_metrics_are_those_of_the_undisturbed_run(
    steps: int, whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = dataclasses.replace(whole, output=tmp_path / "half")
    broken(half, steps, monkeypatch)
    if steps == 4:  # killed before the evaluation, after the step
        path = half.output / "metrics.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"step": 4' not in line))
    resume(half)
    alike(half.output, whole.output)
    resume(half)  # a run that has ended: nothing is doubled
    alike(half.output, whole.output)


def test_a_reward_has_its_sign_back(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(options, method="es", num_directions=2, log_every=4, lr=1e-4, output=tmp_path / "a")
    finetune(options)
    half = dataclasses.replace(options, output=tmp_path / "b")
    broken(half, 3, monkeypatch)
    resume(half)
    alike(half.output, options.output)


def test_the_line_of_a_stop_is_not_one_of_the_run(
    whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C at step 5 there is an evaluation at step 5; the run that goes on has none there."""
    import signal

    half = dataclasses.replace(whole, output=tmp_path / "half")
    with monkeypatch.context() as patch:
        at_call((tasks.Task, "loss"), 11, lambda: signal.raise_signal(signal.SIGINT), patch)
        assert finetune(half).result.steps == 5
    assert records(half.output)[-1]["step"] == 5
    resume(half)
    alike(half.output, whole.output)


@pytest.mark.parametrize(
    "content", [None, b"\xff\xfe\0", b"5\n", b"{}\n", b'{"kind": "eval", "step": -1}\n', b"[" * 5000 + b"\n"]
)
def test_lost_metrics_are_told_and_do_not_stop_a_run(
    content: bytes | None, whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = dataclasses.replace(whole, output=tmp_path / "half")
    broken(half, 5, monkeypatch)
    path = half.output / "metrics.jsonl"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    said = resume(half)
    assert "metrics.jsonl: " in said.replace("\n", "")
    one, two = tensors(whole.output / "checkpoint"), tensors(half.output / "checkpoint")
    assert all(torch.equal(one[name], two[name]) for name in one)
    mine, theirs = records(half.output), records(whole.output)
    assert {**mine[0], "seconds": 0} == {**theirs[0], "seconds": 0}  # of the weights at the start
    assert mine[-1]["loss"] == theirs[-1]["loss"]
    assert content is None or (half.output / "metrics-1.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ([], None),
        (["train 3"], "1 lines of training were lost; they are made from the journal"),
        (["eval 4"], "1 evaluations were lost, the first after step 4"),
        (["eval 0"], None),  # made again
        (["eval 0", "eval 4", "train 3", "train 6"], "2 lines of training were lost"),  # an empty file
    ],
)
def test_lines_that_are_gone_without_a_trace_are_told(
    gone: list[str], said: str | None, whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = dataclasses.replace(whole, output=tmp_path / "half")
    broken(half, 7, monkeypatch)
    path = half.output / "metrics.jsonl"
    path.write_text("".join(lines.line(r) for r in records(half.output) if f"{r['kind']} {r['step']}" not in gone))
    told = " ".join(resume(half).split())
    assert (said in told) if said else ("lost" not in told)
    assert ("evaluations were lost" in told) == ("eval 4" in gone)
    if not any("train" in one or one == "eval 4" for one in gone):
        alike(half.output, whole.output)
    else:
        steps = [(r["kind"], r["step"]) for r in records(half.output)]
        assert steps == [
            (r["kind"], r["step"])
            for r in records(whole.output)
            if f"{r['kind']} {r['step']}" != "eval 4" or "eval 4" not in gone
        ]


def test_a_line_that_was_being_written_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {
        "kind": "eval",
        "step": 0,
        "loss": 1.0,
        "accuracy": 0.5,
        "lr": 0.1,
        "eps": 0.1,
        "seconds": 0.0,
        "forwards": 0,
    }
    text = lines.line(good)
    for cut in range(len(text)):
        path.write_text(text + text[:cut])
        found, wrong = lines.read(path)
        assert wrong is None
        assert found == [good] * (2 if cut == len(text) - 1 else 1)
    path.write_text(text + text[:9] + "\n" + text)
    assert lines.read(path) == ([good], "line 2 is damaged")


def test_lines_that_an_older_zokern_doubled_are_kept_once() -> None:
    """The first: the evaluation of the undisturbed run; and none that a run without a break would not have."""
    options = Options(steps=8, log_every=3, eval_every=4)
    found = [{"kind": "eval", "step": step, "n": n} for n, step in enumerate([0, 4, 4, 5, 8, 8, 12])]
    found += [{"kind": "train", "step": step, "n": step} for step in (0, 3, 5, 8, 9)]
    kept = lines.kept(found, options, 8, [])
    assert [(record["kind"], record["step"], record["n"]) for record in kept] == [
        ("eval", 0, 0), ("eval", 4, 1), ("eval", 8, 4), ("train", 3, 3), ("train", 8, 8),
    ]  # fmt: skip
    assert [record["step"] for record in lines.kept(found, options, 5, [5])] == [0, 4, 5, 3, 5]


# --------------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("change", ["rows", "labels", "text", "order"])
def test_other_data_are_refused(
    change: str,
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = tmp_path / "mine.csv"
    shutil.copyfile(options.data, mine)
    options = dataclasses.replace(options, data=str(mine))
    broken(options, 3, monkeypatch)
    before = (options.output / "journal.zkj").read_bytes()
    head, *rows = mine.read_text().splitlines()
    if change == "rows":
        rows = rows[:-10]
    elif change == "labels":
        rows = [row.replace("animal", "x").replace("fruit", "animal").replace("x", "fruit") for row in rows]
    elif change == "text":
        rows[7] = rows[7].replace(" ", "  the ", 1)
    else:
        rows = rows[::-1]
    mine.write_text("\n".join([head, *rows]) + "\n")
    if change == "order":  # the held-out texts are chosen by their hash, and the rest is in its order: the same run
        resume(options)
        return
    said = refused(options).replace("\n", " ")
    assert "the training texts or their labels" in said
    assert "--data" in said
    assert (options.output / "journal.zkj").read_bytes() == before


def test_other_tokens_are_refused(
    options: Options,
    models_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(models_dir / "classifier", tmp_path / "model")
    options = dataclasses.replace(options, model=str(tmp_path / "model"))
    broken(options, 3, monkeypatch)
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"dog"', '"dig"'))
    assert "its tokenizer" in refused(options)


def test_a_run_of_before_there_were_hashes_goes_on_and_says_so(
    whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = dataclasses.replace(whole, output=tmp_path / "half")
    broken(half, 3, monkeypatch)
    path = half.output / "options.json"
    stored = json.loads(path.read_text())
    del stored["run"]
    path.write_text(json.dumps(stored))
    assert "could not be compared" in resume(half)
    alike(half.output, whole.output)
    assert "could not be compared" not in resume(half)  # from now on there are


def test_paths_are_those_of_the_start(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(options.data, tmp_path / "here.csv")
    monkeypatch.chdir(tmp_path)
    options = dataclasses.replace(options, data="here.csv")
    broken(options, 3, monkeypatch)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    resume(options)
    monkeypatch.chdir(tmp_path)
    resume(options, "--data", "here.csv")


# ---------------------------------------------------------------------------------------------------------------- options


def summary(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())["summary"]


def test_what_the_summary_counts_and_since_when(
    whole: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(whole, output=tmp_path / "broken")
    broken(other, 5, monkeypatch)
    said = resume(other)
    before, after = summary(whole.output), summary(other.output)
    assert (before["since_step"], after["since_step"]) == (0, 5)
    assert "8 steps; since step 5: forwards" in said
    for name in ("steps", "skipped_steps", "accuracy_before", "accuracy_after", "loss_before", "loss_after"):
        assert before[name] == after[name]
    for name, count in before["counters"].items():
        assert after["counters"][name] == (count if name in ("steps", "forwards") else count * 3 // 8), name
    # What --resume finds done is not done again.
    assert "at step 8 of 8: all its steps are done; for more give --steps" in resume(other)
    again = summary(other.output)
    assert again["since_step"] == 8
    assert again["counters"] == {**before["counters"], "passes": 0, "launches": 0, "elements_moved": 0}


def test_options_beside_resume_have_to_be_the_same(whole: Options) -> None:
    said = refused(whole, "--lr", 0.5, "--batch-size", 9, "--method", "hizoo", "--no-journal", "--steps", 7)
    for text in (
        "--lr is 0.5 here and 0.001 there",
        "--batch-size is 9 here",
        "--method is 'hizoo'",
        "--journal is False",
    ):
        assert text in said
    assert "--steps may grow" in said
    assert "--steps is 7; allowed: at least 8" in refused(whole, "--steps", 7)
    assert "--force replaces it" in refused(whole, "--force")
    resume(whole, "--lr", 0.001, "--steps", 8, "--model", whole.model)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_steps_may_grow(schedule: str, options: Options, tmp_path: Path) -> None:
    """With a constant lr as if the run had been longer from the start; else from there on by the longer schedule, told."""
    longer = dataclasses.replace(options, lr_schedule=schedule, steps=14, output=tmp_path / "longer")
    shorter = dataclasses.replace(longer, steps=8, output=tmp_path / "shorter")
    finetune(longer)
    finetune(shorter)
    said = resume(shorter, "--steps", 14).replace("\n", " ")
    assert ("--steps grows from 8 to 14" in said) == (schedule != "constant")
    if schedule == "constant":
        alike(shorter.output, longer.output)
        return
    mine, theirs = ([line for line in records(one.output) if line["step"] > 8] for one in (shorter, longer))
    assert [line["lr"] for line in mine] == [line["lr"] for line in theirs]
    assert "and the next step has lr 0.000428571 in place of 0; the steps done keep theirs" in said
    stored = identity.load(shorter.output)
    assert (stored.options.steps, stored.ends) == (14, [8])
    said = resume(shorter)
    assert "grows" not in said
    assert command("replay", options.model, shorter.output / "journal.zkj", "-o", tmp_path / "again")[0] == 0


def test_fewer_steps_than_done_are_refused(whole: Options) -> None:
    path = whole.output / "options.json"
    path.write_text(path.read_text().replace('"steps": 8', '"steps": 5'))
    before = (whole.output / "checkpoint" / "model.safetensors").read_bytes()
    assert "--steps is 5 in options.json, and 8 are done" in refused(whole)
    assert (whole.output / "checkpoint" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "many"}, {"batch_size": 0}, {"seed": None}, {"steps": None}, {"model": None}, {"method": []}, {"x": 1},
        {"run": 3}, {"run": {}}, {"run": {"hashes": 3}}, {"data": "/nowhere.csv"}, {"warmup_steps": 99}, {"lr": "x"},
        {"output": None}, {"descriptions": 3}, {"run": {"hashes": {}, "ends": ["x"]}},
    ],
)  # fmt: skip
def test_damaged_options_are_a_sentence(change: dict, tmp_path: Path) -> None:
    stored = {**identity.stored(Options()), "run": {"hashes": None, "ends": []}, **change}
    (tmp_path / "options.json").write_text(json.dumps(stored))
    with pytest.raises(FinetuneError, match=r"--resume: .*options\.json cannot be read \(.*\); give the --output"):
        identity.load(tmp_path)


@pytest.mark.parametrize("text", ["", "5", "[]", "{", "{}", '{"model": "demo"}', "\xff", "[" * 5000])
def test_options_that_are_no_json_are_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "options.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FinetuneError, match=r"--resume: .*options\.json cannot be read"):
        identity.load(tmp_path)


def test_a_run_without_a_journal_cannot_go_on(options: Options) -> None:
    finetune(dataclasses.replace(options, journal=False, steps=2))
    assert "--no-journal" in refused(options)
    finetune(dataclasses.replace(options, force=True, steps=2))
    (options.output / "journal.zkj").write_bytes(b"")
    assert "begin again with --force" in refused(options)

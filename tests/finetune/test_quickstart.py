# ruff: noqa: F811 - fixtures of another file
"""The commands of docs/quickstart.md, one after the other, on the file that it shows; with fewer steps and texts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.finetune.test_finetune import models_dir, table  # noqa: F401
from zokern.cli import app

load_file = pytest.importorskip("safetensors.torch").load_file

PAGE = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
FEWER = {"50": "2", "60": "3", "25": "1"}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
def test_commands_do_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (table,) = blocks("csv")
    (tmp_path / "tickets.csv").write_text(table)
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert [command[:2] for command in commands] == [["zokern", "finetune"]] * 3 + [["zokern", "replay"]]
    said = []
    for command in commands:
        smaller = ["--batch-size", "2"] if "--data" in command else []
        done = CliRunner().invoke(app, [*(FEWER.get(word, word) for word in command[1:]), *smaller])
        assert done.exit_code == 0, done.output
        said.append(done.output)
    assert "nothing suspicious was seen" in said[0]
    assert "2/2" in said[1]
    assert "3/3" in said[2]
    listed = re.findall(r"^\| `([^|]*) \| is|^\| ((?:`[^`]+`(?:, )?)+) \|", PAGE, flags=re.MULTILINE)
    names = [name.strip("/") for _, cell in listed for name in re.findall("`([^`]+)`", cell)]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "tickets").iterdir())
    tuned, again = (load_file(tmp_path / place / "model.safetensors") for place in ("tickets/checkpoint", "again"))
    assert tuned.keys() == again.keys()
    assert all(torch.equal(tuned[name], again[name]) for name in tuned)


@pytest.mark.slow
def test_a_tuned_language_model_is_asked_as_docs_finetune_md_says(
    models_dir: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's example, with another text, template and words, finds the probability that the run told."""
    monkeypatch.chdir(tmp_path)
    words = {"animal": "big", "fruit": "here"}
    (tmp_path / "words.json").write_text(json.dumps(words))
    asked = ["--template", "{text} is a", "--verbalizers", "words.json"]
    command = ["finetune", "--model", models_dir / "gpt", "--data", table, *asked, "--steps", "1"]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    page = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    told = json.loads(Path("zokern-out/run.json").read_text())["samples"]
    assert len(told) == 3
    for one in told:
        text = block.replace("A film that one forgets on the way home. It was", f"{one['text']} is a")
        text = text.replace('{"terrible": 0, "great": 1}', '{"big": 0, "here": 1}')
        own: dict[str, object] = {}
        exec(text, own)  # prints the shares
        shares = own["logits"][own["first"]].softmax(0)  # type: ignore[index]
        assert abs(shares[list(words).index(one["right"])].item() - one["after"]["share"]) < 1e-6

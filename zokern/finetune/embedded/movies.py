"""`--data movie-snippets`: sentences of film reviews that twenty people rated, kind or unkind.

They are in the source archive of vaderSentiment (Hutto and Gilbert 2014; MIT licence), close kin of SST-2, which is in no
package. A sentence has the mean of its ratings, from -4 to 4; those within half a point of neutral are left out, as SST-2
leaves out the neutral ones.
"""

from __future__ import annotations

from pathlib import Path

from zokern.finetune.embedded import cache, packages

NAME = "movie-snippets"
PACKAGE = packages.Package(
    "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5, "MIT licence",
)  # fmt: skip
INSIDE, FILE = "additional_resources/hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
FILE_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
LABELS = ("negative", "positive")
SURE = 0.5  # of 4: the least distance of a mean rating from neutral


def rated() -> list[tuple[str, float]]:
    """(sentence, mean rating) of each line. Raises FinetuneError."""
    path = cache.kept(f"{NAME}-{FILE_SHA256[:12]}", _make, 20_000_000) / FILE
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    return [(text, float(rating)) for _, rating, text in lines]


def sentences() -> list[tuple[str, str]]:
    """All (sentence, label) pairs, in the order of the file."""
    return [(text, LABELS[rating > 0]) for text, rating in rated() if abs(rating) >= SURE]


def _make(directory: Path) -> None:
    packages.take(PACKAGE, [INSIDE, FILE], FILE_SHA256, directory / FILE, f"--data {NAME}")

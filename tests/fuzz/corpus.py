"""The stored journals that fuzzing starts from: of every kind of pass, with a skipped and a broken off step.

`python -m tests.fuzz.corpus` makes those that are missing. What is stored stays: it is of this format's first version.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from tests.fuzz.targets import CASES, begin
from zokern import journal

FOLDER = Path(__file__).parents[1] / "data" / "journals"
STEPS = 5


def stored() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.zkj"))}


def make(name: str, path: Path) -> None:
    made, _, loss_of = begin(CASES[name])
    calls = [0]

    def closure() -> float:
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt
        loss = round(float(loss_of()) * 1024) / 1024
        return math.nan if calls[0] == 4 else loss

    with journal.write(made, path):
        while made.counters["steps"] < STEPS:
            with contextlib.suppress(KeyboardInterrupt):
                made.step(closure)
            for group in made.param_groups:
                group["lr"] *= 0.5
        if made.count_waiting():
            made.fold()
            made.step(closure)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        path = FOLDER / f"{name}.zkj"
        if not path.exists():
            make(name, path)
            print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()

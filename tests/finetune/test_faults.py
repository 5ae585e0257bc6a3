"""Runs that are killed, and runs whose disk is full: what they leave goes on and ends as the undisturbed run does.

A few here; `make faults` does ZOKERN_FAULTS of each kind, 200 by default.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tests.finetune.children import command, ended, fork, killed_after, killed_at, limited  # noqa: E402
from tests.finetune.test_finetune import models_dir, table  # noqa: E402, F401
from tests.finetune.test_resuming import alike, finished, no_pictures  # noqa: E402, F401
from tests.finetune.test_stopping import given  # noqa: E402
from zokern.finetune import Options, former  # noqa: E402
from zokern.finetune.output import Output  # noqa: E402

COUNT = int(os.environ.get("ZOKERN_FAULTS", "200"))
KILLED = -9


class Disturbed:
    """The run of `finished`, in a place of its own, to be disturbed and to be taken up again."""

    def __init__(self, undisturbed: Options, tmp_path: Path) -> None:
        self.undisturbed, self.output, self.said = undisturbed.output, tmp_path / "out", tmp_path / "said"
        line = given(undisturbed)
        line[line.index("--output") + 1] = str(self.output)
        self.run, self.resume = command(*line), command("finetune", "--resume", "--output", self.output)

    def goes_on(self) -> bool:
        """Takes it up, or begins it again where it had done nothing; whether it was resumable. It ends as it has to."""
        resumable = self.output.is_dir() and former.valuable(self.output)
        code = ended(fork(self.resume if resumable else self.run, self.said))
        assert code == 0, self.said.read_text()
        alike(self.output, self.undisturbed)
        assert {path.name for path in self.output.iterdir()} == set(former.NAMES)
        shutil.rmtree(self.output)
        return resumable


@pytest.fixture
def disturbed(finished: Options, tmp_path: Path) -> Disturbed:  # noqa: F811
    return Disturbed(finished, tmp_path)


# Before options.json, before the journal, in its steps (of a reading of the checkpoint's temporary directory), after it.
@pytest.mark.parametrize("number", [8, 12, 17, 24])
def test_killed_at_a_change_of_a_file(number: int, disturbed: Disturbed) -> None:
    assert killed_at(disturbed.run, disturbed.said, disturbed.output, number) == KILLED
    assert disturbed.goes_on() == (number > 12)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(("kind", "step"), [("train", 6), ("eval", 4), ("eval", 8)])
def test_killed_at_a_line_of_metrics(kind: str, step: int, written: bool, disturbed: Disturbed) -> None:
    plain = Output.log

    def log(self: Output, record: dict) -> None:
        last = (record["kind"], record["step"]) == (kind, step)
        if not last or written:
            plain(self, record)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "log", log)
        assert ended(fork(disturbed.run, disturbed.said)) == KILLED
    assert disturbed.goes_on()


@pytest.mark.parametrize("size", [100, 2000, 4200, 8000])
def test_a_full_disk(size: int, disturbed: Disturbed) -> None:
    """Every size is told in one sentence, which names the way on where there is one."""
    fills(size, disturbed)


def fills(size: int, disturbed: Disturbed) -> bool:
    code = limited(disturbed.run, disturbed.said, size)
    said = disturbed.said.read_text()
    if code == 0:
        alike(disturbed.output, disturbed.undisturbed)
        shutil.rmtree(disturbed.output)
        return False
    assert code == 1, said
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1, said
    assert "--output" in errors[0]
    resumable = disturbed.output.is_dir() and former.valuable(disturbed.output)
    assert ("--resume" in errors[0]) == resumable, said
    without_gradients(disturbed)
    return True


def without_gradients(disturbed: Disturbed) -> None:
    """A line of metrics that found no room comes from the journal, without its projected gradient."""
    code = ended(fork(disturbed.resume if former.valuable(disturbed.output) else disturbed.run, disturbed.said))
    assert code == 0, disturbed.said.read_text()
    alike(disturbed.output, disturbed.undisturbed, but=("seconds", "projected_gradient"))
    shutil.rmtree(disturbed.output)


@pytest.mark.faults
def test_killed_at_random_moments(disturbed: Disturbed, capsys: pytest.CaptureFixture) -> None:
    """Each run is killed again and again until it has done something or ended, and then ends as it has to."""
    draw, begun = random.Random(0), time.monotonic()
    assert ended(fork(disturbed.run, disturbed.said)) == 0, disturbed.said.read_text()
    took = time.monotonic() - begun
    shutil.rmtree(disturbed.output)
    kills = resumable = 0
    while kills < COUNT:
        again: Callable[[], object] = disturbed.run
        for _ in range(draw.randrange(1, 4)):
            if killed_after(again, disturbed.said, draw.uniform(0, took)) == KILLED:
                kills += 1
            if disturbed.output.is_dir() and former.valuable(disturbed.output):
                again = disturbed.resume
        resumable += disturbed.goes_on()
    with capsys.disabled():
        print(f"\n{kills} kills, {resumable} runs went on from their journal")
    assert resumable > 0


@pytest.mark.faults
def test_killed_at_every_change_of_a_file(disturbed: Disturbed) -> None:
    number = 0
    while killed_at(disturbed.run, disturbed.said, disturbed.output, number) == KILLED:
        disturbed.goes_on()
        number += 1
    assert number > 25


@pytest.mark.faults
def test_full_disks_of_many_sizes(disturbed: Disturbed) -> None:
    draw = random.Random(1)
    failed = sum(fills(draw.randrange(0, 20_000), disturbed) for _ in range(COUNT // 4))
    assert failed > COUNT // 8

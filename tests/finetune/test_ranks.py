"""`zokern finetune` by several processes: the bits of one, one voice, one end; whatever breaks off goes on."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import pytest
import torch.distributed as dist

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tests.finetune.children import command, ended, fork, launched  # noqa: E402
from tests.finetune.test_finetune import models_dir, options, records, table  # noqa: E402, F401
from tests.finetune.test_resuming import alike, finished, no_pictures  # noqa: E402, F401
from tests.finetune.test_stopping import given  # noqa: E402
from zokern.finetune import FinetuneError, Options, finetune, ranks, tasks  # noqa: E402
from zokern.journal import tools  # noqa: E402

Disturbance = Callable[[], object]
TEXTS = list(range(10, 17))


class Ranks:
    """Processes that are forked from this one and run the command together; what each says, and its exit code."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def __call__(
        self, world: int, *arguments: object, restart: int = 0, **disturbed: Disturbance
    ) -> list[tuple[int, str]]:
        """disturbed: what a rank does first, as rank_1=..."""
        self.number += 1
        store = self.folder / f"store{self.number}"
        children = []
        for rank in range(world):
            said = self.folder / f"said{self.number}.{rank}"
            first = disturbed.get(f"rank_{rank}", lambda: None)
            children.append((fork(self._rank(rank, world, store, restart, first, arguments), said), said))
        return [(ended(child), without_gloos(said.read_text())) for child, said in children]

    def _rank(
        self, rank: int, world: int, store: Path, restart: int, first: Disturbance, arguments: tuple[object, ...]
    ) -> Disturbance:
        def run() -> None:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), TORCHELASTIC_RESTART_COUNT=str(restart)
            )
            dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
            first()
            command(*arguments)()

        return run


def without_gloos(said: str) -> str:
    """Without what gloo says of its connections before PyTorch 2.11."""
    return "".join(line for line in said.splitlines(keepends=True) if not line.startswith("[Gloo] "))


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(ranks, "TOGETHER", 1.0)
    (tmp_path / "said").mkdir()
    return Ranks(tmp_path / "said")


def at_loss(number: int, do: Disturbance) -> Disturbance:
    """Something happens in a rank's forward of that number."""

    def patch() -> None:
        plain, calls = tasks.Task.loss, [0]

        def loss(self: tasks.Task, batch: object) -> object:
            calls[0] += 1
            if calls[0] == number:
                do()
            return plain(self, batch)

        tasks.Task.loss = loss

    return patch


def out_of_memory() -> None:
    raise MemoryError("in a forward")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def line(finished: Options, output: Path, parallel: str, **more: object) -> list[str]:
    options = dataclasses.replace(finished, output=output)
    return [*given(options), "--parallel", parallel, *(str(x) for k, v in more.items() for x in (f"--{k}", v))]


def errors(said: str) -> list[str]:
    assert "Traceback" not in said, said
    return [one for one in said.splitlines() if "error: " in one]


# --------------------------------------------------------------------------------------------------------------- the bits


def test_parts_of_the_batch_are_micro_batches_of_one_process(finished: Options, several: Ranks, tmp_path: Path) -> None:
    (code, said), other = several(2, *line(finished, tmp_path / "two", "data"))
    assert (code, other) == (0, (0, "")), said
    assert "2, each with 4 of the 8 of a batch" in said
    one = dataclasses.replace(finished, output=tmp_path / "one", batch_size=4, accumulate=2)
    finetune(one)
    alike(tmp_path / "two", one.output, but=("seconds", "forwards"))
    assert tools.first_difference(tmp_path / "two" / "journal.zkj", one.output / "journal.zkj") is None
    run = (tmp_path / "two" / "run.json").read_text()
    assert '"ranks": 2' in run


def test_shares_of_the_directions_are_those_of_one_process(finished: Options, several: Ranks, tmp_path: Path) -> None:
    """Of two forwards three ranks have two."""
    (code, said), *others = several(3, *line(finished, tmp_path / "three", "directions"))
    assert (code, others) == (0, [(0, ""), (0, "")]), said
    alike(tmp_path / "three", finished.output)
    code, said = ended(fork(command("replay", finished.model, tmp_path / "three" / "journal.zkj", "-o", tmp_path / "again"),
                            tmp_path / "replayed")), (tmp_path / "replayed").read_text()  # fmt: skip
    assert code == 0, said
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "three/checkpoint"))
    assert one == two


@pytest.mark.parametrize(("world", "sizes"), [(2, [4, 3]), (3, [3, 2, 2]), (7, [1] * 7)])
def test_every_text_of_a_batch_is_some_ranks(world: int, sizes: list[int]) -> None:
    options = Options(batch_size=7, parallel="data")
    found = [ranks.Team(rank, world).share([TEXTS, TEXTS[::-1]], options) for rank in range(world)]
    assert [text for own, _ in found for text in own[0]] == TEXTS
    assert [text for own, _ in found for text in own[1]] == TEXTS[::-1]
    assert [len(own[0]) for own, _ in found] == sizes
    assert [w for _, w in found] == ([None] * 7 if world == 7 else [[float(size)] * 2 for size in sizes])
    assert ranks.Team(1, world).share([TEXTS], Options(parallel="directions")) == ([TEXTS], None)


def test_uneven_parts_end_alike(finished: Options, several: Ranks, tmp_path: Path) -> None:
    options = dataclasses.replace(finished, batch_size=7)
    (code, said), (other, _) = several(2, *line(options, tmp_path / "two", "data"))
    assert (code, other, "2, each with 4 or 3 of the 7 of a batch" in said) == (0, 0, True), said
    assert [record["step"] for record in records(tmp_path / "two")] == [0, 3, 4, 6, 8, 8]


# ---------------------------------------------------------------------------------------------------------------- the end


def test_what_is_wrong_is_said_once(finished: Options, several: Ranks, tmp_path: Path) -> None:
    options = dataclasses.replace(finished, output=tmp_path / "new")
    for arguments, what in (
        (given(options), "give --parallel data (each rank takes its part of every batch) or --parallel directions"),
        (line(options, options.output, "data", data="none.csv"), "--data is 'none.csv'"),
        (line(options, options.output, "data,directions"), "--parallel is "),
        (line(dataclasses.replace(options, batch_size=1), options.output, "data"), "give at least 2"),
        (line(finished, finished.output, "data"), "--force"),
        ([*given(options), "--check"], "leave out torchrun"),
        (["finetune", "--resume", "--output", finished.output], "is one of a single process; leave out torchrun"),
    ):
        (code, said), other = several(2, *arguments)
        assert (code, other) == (1, (1, "")), said
        assert len(errors(said)) == 1, said
        assert what in said
        assert not options.output.exists()
    with pytest.raises(FinetuneError, match="torchrun --nproc-per-node 2"):
        finetune(dataclasses.replace(options, parallel="data"))


def test_no_rank_ends_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher ends all at the first that has failed."""
    monkeypatch.setattr(ranks, "TOGETHER", 60.0)
    first, second = (ranks.Team(rank, 2, store=dist.HashStore()) for rank in (0, 1))
    second.store = first.store
    for code in (1, 0):
        first.store.delete_key("ended")
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(second.end, code)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            assert first.end(143) == 143
            assert waiting.result(timeout=30) == 143
    monkeypatch.setattr(ranks, "TOGETHER", 0.0)
    first.store.delete_key("ended")
    assert second.end(1) == 1  # the first one hangs


@pytest.mark.parametrize("disturbance", [out_of_memory, killed])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_all_and_all_go_on(
    rank: int, disturbance: Disturbance, finished: Options, several: Ranks, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    found = several(2, *line(finished, output, "directions"), **{f"rank_{rank}": at_loss(6, disturbance)})
    (first, said), (second, other) = found
    assert other == ""
    if rank == 1:
        assert (first, second) == (1, -9 if disturbance is killed else 1), said
        (error,) = errors(said)
        assert disturbance is killed or "rank 1 raised MemoryError: in a forward in step 5" in error
        assert "5 of 8 steps are in" in error
        assert f"torchrun --nproc-per-node 2 -m zokern finetune --resume --output {output}" in error
    else:
        assert (first, second) == (-9 if disturbance is killed else 1, 1), said
    for code, said in several(3, "finetune", "--resume", "--output", output):
        assert code == 0, said
        if said:
            assert "resumed   at step 5 of 8" in said
            assert "the run began with 2 processes and goes on with 3" in said
    alike(output, finished.output)


def test_torchruns_own_restart_goes_on(finished: Options, several: Ranks, tmp_path: Path) -> None:
    arguments = line(finished, tmp_path / "run", "directions")
    several(2, *arguments, rank_1=at_loss(6, killed))
    (code, said), other = several(2, *arguments, restart=1)
    assert (code, other, "resumed   at step 5 of 8" in said) == (0, (0, ""), True), said
    alike(tmp_path / "run", finished.output)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_all_saved(rank: int, finished: Options, several: Ranks, tmp_path: Path) -> None:
    output = tmp_path / "run"
    disturbed = at_loss(6, lambda: signal.raise_signal(signal.SIGTERM))
    (code, said), other = several(2, *line(finished, output, "directions"), **{f"rank_{rank}": disturbed})
    assert (code, other) == (143, (143, "")), said
    assert "stopped by SIGTERM after 6 steps; saving" in said
    assert (output / "checkpoint").is_dir()
    (code, said), other = several(2, "finetune", "--resume", "--output", output)
    assert (code, other) == (0, (0, "")), said
    alike(output, finished.output)


# ------------------------------------------------------------------------------------------------------- torchrun itself

SCRIPT = """
import os, signal
from tests.finetune.test_ranks import at_loss, killed
from zokern.cli import app
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and "KILLED" in os.environ:
    at_loss(6, killed)()
app(prog_name="zokern")
"""


def torchrun(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, *map(str, arguments)], capture_output=True, text=True, timeout=200, env={**os.environ, **environment}
    )


def test_under_torchruns_launcher(finished: Options, tmp_path: Path) -> None:
    code = ended(fork(launched(command(*line(finished, tmp_path / "run", "directions"))), tmp_path / "said"))
    said = (tmp_path / "said").read_text()
    assert code == 0, said
    assert said.count("accuracy  ") == 1
    alike(tmp_path / "run", finished.output)


@pytest.mark.faults
def test_under_torchrun(finished: Options, tmp_path: Path) -> None:
    """As above, each rank a fresh process."""
    done = torchrun("-m", "zokern", *line(finished, tmp_path / "run", "directions"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy  ") == 1
    alike(tmp_path / "run", finished.output)


@pytest.mark.faults
def test_torchrun_starts_killed_ranks_again(finished: Options, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = line(finished, tmp_path / "run", "directions")
    done = torchrun("--max-restarts", 1, tmp_path / "script.py", *arguments, KILLED="1", PYTHONPATH=os.getcwd())
    assert done.returncode == 0, done.stderr
    assert "resumed   at step 5 of 8" in done.stdout
    alike(tmp_path / "run", finished.output)

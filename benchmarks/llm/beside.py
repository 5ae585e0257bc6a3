"""A MeZO step on a real language model: `zokern finetune`'s own, beside the released loop and an older build.

    python -m benchmarks.llm.beside
    python -m benchmarks.llm.beside --beside ../zokern-old  # and another checkout, built in place

Each way has a process of its own, with the model and the same sentences; they take turns, so that in a round all of them
step on the same batch. A ratio is that of two ways in one round; the table has the median over the rounds, and the range.

released            benchmarks/llm/released.py: a row for each label, padded, all logits; four sweeps of torch.normal
released, one row   kinder than what is released: one row a sentence
finetune            `zokern finetune` with the defaults: MeZO, packed rows, in place
low rank            and --distribution lowrank:1 --placement forward
low rank, folded    and --fold-every 8; a visit is 8 steps, all on the round's batch, the last of which folds
older               the other checkout's `zokern finetune` with its defaults

Memory first, of two steps (8, folded) on one batch, by the resident set's peak: see beside_worker.py. Stores
benchmarks/results/llm-beside-cpu.json.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import study
from benchmarks.llm import reviews
from zokern.bench.record import store
from zokern.cli.waiting import spin_briefly
from zokern.finetune import models

ROOT = Path(__file__).resolve().parents[2]
FOLDED = 8  # steps
WEIGHED = 2  # steps: what the first one leaves behind is there in the second
LONGEST = 128  # tokens of a prompt: no sentence is cut
LOW_RANK = {"distribution": "lowrank:1", "placement": "forward"}


@dataclass(frozen=True)
class Way:
    """more: options beside the defaults. steps: of a visit. older: of the other checkout."""

    more: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    older: bool = False


WAYS = {
    "released": Way({"packing": "never"}),
    "released, one row": Way({"packing": "never"}),
    "finetune": Way(),
    "low rank": Way(LOW_RANK),
    "low rank, folded": Way({**LOW_RANK, "fold_every": FOLDED}, FOLDED),
    "older": Way(older=True),
}


class Process:
    """A way at work. texts: how many sentences it has."""

    def __init__(self, way: str, options: Mapping[str, Any], root: Path) -> None:
        self.way, self.said = way, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.llm.beside_worker"],
            env={**os.environ, "PYTHONPATH": str(root)}, cwd=root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
        )  # fmt: skip
        self._say({"way": way, "options": options})

    def start(self) -> None:
        """Waits until it has loaded."""
        self.texts: int = self._told()["texts"]

    def ask(self, rows: Sequence[int], steps: int, *, weigh: bool) -> dict[str, Any]:
        self._say({"rows": list(rows), "steps": steps, "weigh": weigh})
        return self._told()

    def _say(self, order: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)

    def _told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.said.seek(0)
            last = (self.said.read().strip().splitlines() or ["it said nothing"])[-1]
            raise SystemExit(f"the process of '{self.way}' ended early, with code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()


def write_sentences(folder: Path) -> dict[str, str]:
    """What all ways are given: the training sentences, and two to evaluate before the first step, as files."""
    train = reviews.read()["train"]
    rows = [(text, reviews.LABELS[label]) for text, label in zip(train.texts, train.targets, strict=True)]
    few = [next(row for row in rows if row[1] == label) for label in reviews.LABELS]
    for name, part in (("train", rows), ("few", few)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    words = folder / "words.json"
    words.write_text(json.dumps(dict(zip(reviews.LABELS, reviews.WORDS, strict=True))))
    return {"data": str(folder / "train.csv"), "eval_data": str(folder / "few.csv"), "verbalizers": str(words)}


@contextlib.contextmanager
def at_work(model: str, beside: Path | None, chosen: Sequence[str], threads: int) -> Iterator[dict[str, Process]]:
    """The processes of the ways, loaded one after another."""
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        given = write_sentences(folder)
        found: dict[str, Process] = {}
        for i, way in enumerate(track(chosen, description="loading", console=Console(stderr=True))):
            root = folder / f"root{i}"  # one `benchmarks` for all, each its own `zokern`
            root.mkdir()
            (root / "benchmarks").symlink_to(ROOT / "benchmarks")
            (root / "zokern").symlink_to((beside if WAYS[way].older and beside else ROOT) / "zokern")
            options = {
                "model": model, **given, "objective": "prompt", "template": reviews.TEMPLATE, "max_length": LONGEST,
                "steps": 10**6, "lr_schedule": "constant", "eval_every": 0, "output": str(folder / f"out{i}"),
                "dtype": "float32", "device": "cpu", "threads": threads, **WAYS[way].more,
            }  # fmt: skip
            found[way] = Process(way, options, root)
            held.callback(found[way].close)
            found[way].start()
        yield found


def same(what: str, found: Mapping[str, float], tolerance: float = 0.0) -> None:
    """Ends the program where ways do not agree in what they are to have in common."""
    first, *rest = found.items()
    if wrong := [name for name, value in rest if abs(value - first[1]) > tolerance * abs(first[1])]:
        told = ", ".join(f"{name}: {found[name]}" for name in (first[0], *wrong))
        raise SystemExit(f"the ways do not have the same {what}, so their times cannot be compared ({told})")


def measure(running: Mapping[str, Process], rounds: int, batch: int) -> dict[str, Any]:
    """Of each way its memory, and what each round took."""
    same("number of sentences", {name: process.texts for name, process in running.items()})
    draw = random.Random(0)
    every = range(next(iter(running.values())).texts)
    rows = draw.sample(every, batch)
    memory = {
        name: process.ask(rows, max(WEIGHED, WAYS[name].steps), weigh=True)
        for name, process in track(running.items(), description="memory", console=Console(stderr=True))
    }
    same("loss", {name: found["loss"] for name, found in memory.items()}, 1e-3)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    for _ in track(range(rounds), description="rounds", console=Console(stderr=True)):
        rows = draw.sample(every, batch)
        for name, process in running.items():
            taken[name].append(process.ask(rows, WAYS[name].steps, weigh=False))
        same("tokens", {name: each[-1]["tokens"] for name, each in taken.items()})
    return {name: {"memory": memory[name], "rounds": taken[name]} for name in running}


def main() -> None:
    parser = study.parser(
        __doc__,
        model=("smollm2", "smollm2, or a folder that save_pretrained wrote"),
        beside=(Path, "another checkout, with its module built in place"),
        rounds=(5, "of all ways, timed"),
        batch=(16, "sentences"),
        threads=(torch.get_num_threads(), "of each process"),
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.batch < 1:
        parser.error("--rounds and --batch must be at least 1")
    if args.beside is not None and not (args.beside / "zokern" / "__init__.py").is_file():
        parser.error(f"--beside is {args.beside}, where there is no zokern")
    spin_briefly()  # as the command does; the processes inherit it
    chosen = [name for name, way in WAYS.items() if args.beside is not None or not way.older]
    beside = args.beside.resolve() if args.beside is not None else None
    with at_work(models.locate(args.model), beside, chosen, args.threads) as running:
        results = measure(running, args.rounds, args.batch)
    settings = {"rounds": args.rounds, "batch": args.batch, "threads": args.threads, "longest": LONGEST,
                "older": commit_of(beside) if beside else None}  # fmt: skip
    path = store("llm-beside", torch.device("cpu"), settings, results, args.output)
    print(f"stored {path}")


def commit_of(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()

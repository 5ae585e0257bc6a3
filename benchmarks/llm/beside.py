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

Memory (--part memory) is that of two steps (8, folded) on one batch, by the resident set's peak, of processes of their own
one after another, whose malloc is told to give back what is freed: see beside_worker.py and benchmarks/resident.py. Other
programs do not disturb it, but they do the times (--part time). Stores benchmarks/results/llm-beside-cpu.json; a part that
is not asked for stays in it.
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

from benchmarks import resident, study
from benchmarks.llm import reviews
from zokern.bench.record import RESULTS, store
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

    def __init__(self, way: str, options: Mapping[str, Any], root: Path, environment: Mapping[str, str]) -> None:
        self.way, self.said = way, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.llm.beside_worker"],
            env={**os.environ, **environment, "PYTHONPATH": str(root)}, cwd=root, text=True,
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


class Bench:
    """Starts the ways. folder: for what they are given and what they write."""

    def __init__(self, folder: Path, model: str, beside: Path | None, threads: int) -> None:
        self.folder, self.beside = folder, beside
        self.options = {
            "model": model, **write_sentences(folder), "objective": "prompt", "template": reviews.TEMPLATE,
            "max_length": LONGEST, "steps": 10**6, "lr_schedule": "constant", "eval_every": 0, "dtype": "float32",
            "device": "cpu", "threads": threads,
        }  # fmt: skip

    @contextlib.contextmanager
    def started(self, way: str, environment: Mapping[str, str] | None = None) -> Iterator[Process]:
        """One way's process, loaded."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name, contextlib.ExitStack() as held:
            root = Path(name)  # one `benchmarks` for all, each its own `zokern`
            (root / "benchmarks").symlink_to(ROOT / "benchmarks")
            checkout = self.beside if WAYS[way].older and self.beside else ROOT
            (root / "zokern").symlink_to(checkout / "zokern")
            options = {**self.options, "output": str(root / "out"), **WAYS[way].more}
            process = Process(way, options, root, environment or {})
            held.callback(process.close)
            process.start()
            yield process

    def memory(self, ways: Sequence[str], batch: int) -> dict[str, dict[str, float]]:
        """Bytes of each."""
        found: dict[str, dict[str, float]] = {}
        for way in track(ways, description="memory", console=Console(stderr=True)):
            with self.started(way, resident.GIVES_BACK) as process:
                rows = random.Random(0).sample(range(process.texts), batch)
                found[way] = process.ask(rows, max(WEIGHED, WAYS[way].steps), weigh=True)
        same("loss", {way: one["loss"] for way, one in found.items()}, 1e-3)
        return found

    def times(self, ways: Sequence[str], batch: int, rounds: int) -> dict[str, list[dict[str, float]]]:
        """What each round took. The first one warms up."""
        taken: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        with contextlib.ExitStack() as held:
            running = {
                way: held.enter_context(self.started(way))
                for way in track(ways, description="loading", console=Console(stderr=True))
            }
            same("number of sentences", {way: process.texts for way, process in running.items()})
            draw = random.Random(0)
            for number in track(range(rounds + 1), description="rounds", console=Console(stderr=True)):
                rows = draw.sample(range(running[ways[0]].texts), batch)
                now = {
                    way: process.ask(rows, WAYS[way].steps if number else 1, weigh=False)
                    for way, process in running.items()
                }
                same("tokens", {way: one["tokens"] for way, one in now.items()})
                for way, one in now.items():
                    if number:
                        taken[way].append(one)
        return taken


def same(what: str, found: Mapping[str, float], tolerance: float = 0.0) -> None:
    """Ends the program where ways do not agree in what they are to have in common."""
    first, *rest = found.items()
    if wrong := [name for name, value in rest if abs(value - first[1]) > tolerance * abs(first[1])]:
        told = ", ".join(f"{name}: {found[name]}" for name in (first[0], *wrong))
        raise SystemExit(f"the ways do not have the same {what}, so their times cannot be compared ({told})")


def main() -> None:
    parser = study.parser(
        __doc__,
        model=("smollm2", "smollm2, or a folder that save_pretrained wrote"),
        beside=(Path, "another checkout, with its module built in place"),
        part=(("both", "memory", "time"), "what is measured"),
        rounds=(5, "of all ways, timed"),
        batch=(16, "sentences"),
        threads=(torch.get_num_threads(), "of each process"),
        ways=(list(WAYS), f"of {', '.join(WAYS)} (default: all, the last with --beside)"),
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.batch < 1:
        parser.error("--rounds and --batch must be at least 1")
    if args.beside is not None and not (args.beside / "zokern" / "__init__.py").is_file():
        parser.error(f"--beside is {args.beside}, where there is no zokern")
    spin_briefly()  # as the command does; the processes inherit it
    if unknown := [name for name in args.ways if name not in WAYS]:
        parser.error(f"--ways: there is no {', '.join(unknown)}; there are {', '.join(WAYS)}")
    chosen = [name for name in args.ways if args.beside is not None or not WAYS[name].older]
    beside = args.beside.resolve() if args.beside is not None else None
    settings = {"batch": args.batch, "threads": args.threads, "longest": LONGEST, "folded": FOLDED,
                "older": commit_of(beside) if beside else None}  # fmt: skip
    path = args.output or RESULTS / "llm-beside-cpu.json"
    results = json.loads(path.read_text())["results"] if path.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), models.locate(args.model), beside, args.threads)
        if args.part != "time":
            results["memory"] = bench.memory(chosen, args.batch)
        if args.part != "memory":
            results["rounds"] = bench.times(chosen, args.batch, args.rounds)
    store("llm-beside", torch.device("cpu"), settings, results, path, complete=results.keys() == {"memory", "rounds"})
    print(f"stored {path}")


def commit_of(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()

"""`make demo-lm` with three seeds: what it gains, how long it takes, what its journal weighs.

    python -m benchmarks.llm.demo                          # a quarter of an hour on two cores
    python -m benchmarks.pages docs/finetune.md            # its figures and picture anew

The settings are those of the Makefile. lr was chosen on other sentences and seeds: with those that the runs here hold out
taken away first, another 400 of the rest held out, and seeds 11 and 12. A seed that is stored with the same settings is not
run again. Stores benchmarks/results/demo-lm-cpu.json.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import study
from benchmarks.parts import ROOT, load, made_on, panels, plain, save, table
from zokern.bench.record import RESULTS, store

FILE, SEEDS = "demo-lm-cpu.json", (0, 1, 2)
KEPT = ("samples", "summary", "versions", "machine")  # of run.json


def flags() -> list[str]:
    """What the Makefile gives to `zokern finetune`."""
    found = re.search(r"^DEMO_LM = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return shlex.split(found[1])


def run(seed: int, directory: Path) -> dict[str, Any]:
    """One run in a process of its own, which prints as it goes."""
    command = [sys.executable, "-m", "zokern", "finetune", *flags(), "--seed", str(seed), "--output", str(directory)]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(f"seed {seed} ended with {code}; what it said is above")
    said = json.loads((directory / "run.json").read_text())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    curve = [{"forwards": one["forwards"], "accuracy": one["accuracy"], "loss": one["loss"]}
             for one in lines if one["kind"] == "eval"]  # fmt: skip
    return {"seed": seed, **{name: said[name] for name in KEPT}, "curve": curve,
            "journal_bytes": (directory / "journal.zkj").stat().st_size}  # fmt: skip


def main() -> int:
    options = study.parser(__doc__).parse_args()
    path = options.output or RESULTS / FILE
    settings = {"flags": flags(), "seeds": list(SEEDS)}
    stored = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "results": []}
    results = stored["results"] if stored["settings"] == settings else []
    for seed in SEEDS:
        if seed not in [one["seed"] for one in results]:
            with tempfile.TemporaryDirectory() as folder:
                results.append(run(seed, Path(folder) / "out"))
            done = len(results) == len(SEEDS)
            store("demo-lm", torch.device("cpu"), settings, results, path, complete=done)
    print(f"stored {path}; now python -m benchmarks.pages docs/finetune.md")
    return 0


def _points(one: dict[str, Any]) -> float:
    return float(one["summary"]["points_gained"])


def middle() -> dict[str, Any]:
    """The run of the seed that gained the median."""
    return sorted(load(FILE)["results"], key=_points)[len(SEEDS) // 2]  # type: ignore[no-any-return]


def headline() -> str:
    """A sentence with the median seed's figures."""
    one, runs = middle(), load(FILE)["results"]
    end, gains = one["summary"], sorted(map(_points, runs))
    return (
        f"accuracy on 400 held-out sentences **{end['accuracy_before']:.1%} -> {end['accuracy_after']:.1%}** (the median "
        f"of three seeds, which gain {gains[0]:.1f}, {gains[1]:.1f} and {gains[2]:.1f} points) in "
        f"{median(r['summary']['seconds']['training'] for r in runs) / 60:.1f} minutes of training on "
        f"{one['machine']['threads']} cores ({end['steps']} steps, {end['counters']['forwards']} forwards, no backward); "
        f"the journal, which makes the tuned model again, has {one['journal_bytes'] / 1000:.0f} kB."
    )


def said() -> str:
    """The sentences that the median seed's run shows."""
    rows = []
    for each in middle()["samples"]:
        before, after = (f"{each[when]['share']:.0%}" for when in ("before", "after"))
        text = " ".join(each["text"].split())
        rows.append([text.replace("|", "\\|"), each["right"], before, after])
    return table(["sentence", "it is", "the model's probability of that, before", "after"], rows, tight=True)


def machine() -> str:
    return made_on(load(FILE)).replace("One run", "Three runs") + "."


def draw() -> None:
    """Held-out accuracy against forwards, a line for each seed."""
    figure, (axes,) = panels(1, 6, 3.4)
    for one in load(FILE)["results"]:
        x, y = [p["forwards"] for p in one["curve"]], [100 * p["accuracy"] for p in one["curve"]]
        axes.plot(x, y, label=f"seed {one['seed']}", linewidth=1.4)
    axes.set_xlabel("forwards")
    axes.set_ylabel("accuracy on 400 held-out sentences, %")
    plain(axes)
    axes.legend(frameon=False, fontsize=8)
    save(figure, "demo-lm", metadata={"Software": None})


PAGES = {
    "README.md": {"demo-lm": headline},
    "docs/finetune.md": {"demo-lm": headline, "demo-lm-said": said, "demo-lm-machine": machine},
}


if __name__ == "__main__":
    sys.exit(main())

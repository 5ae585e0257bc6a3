"""Writes every figure of README.md and docs/ from benchmarks/results and from the code, and draws the pictures.

python -m benchmarks.pages                            # all pages
python -m benchmarks.pages docs/steps.md              # one of them
python -m benchmarks.pages --check                    # exit code 1 if a page is not what this would write
python -m benchmarks.pages --demo demo-out/run.json   # keeps that demo run as the one that README.md tells of

Each subject's module says what it makes (PAGES), and may draw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import benchmarks.arm.page
import benchmarks.choose.page
import benchmarks.convergence.page
import benchmarks.drift.run
import benchmarks.front.page
import benchmarks.gpu.page
import benchmarks.kernels.page
import benchmarks.layers.run
import benchmarks.lengths.run
import benchmarks.llm.beside_page
import benchmarks.llm.demo
import benchmarks.llm.page
import benchmarks.llm.page_cpu
import benchmarks.llm.papers
import benchmarks.llm.picture_cpu
import benchmarks.lowrank.learning
import benchmarks.lowrank.populations
import benchmarks.lowrank.speed
import benchmarks.machine_code.amd_page
import benchmarks.machine_code.page
import benchmarks.matrix
import benchmarks.memory.page
import benchmarks.memory.placed_page
import benchmarks.ranks.scale
import benchmarks.ranks.speed
import benchmarks.replay.run
import benchmarks.rewards.page
import benchmarks.rounding.page
import benchmarks.steps.host
import benchmarks.steps.page
import benchmarks.steps.passes
import benchmarks.trainer.run
import docs.from_code
from benchmarks.parts import RESULTS, load, write


def store_demo(path: Path) -> None:
    """Keeps a demo run's record as a result: everything but its command line and the paths in its options."""
    run = json.loads(path.read_text())
    del run["command"], run["options"]["output"]
    (RESULTS / "demo-cpu.json").write_text(json.dumps(run, indent=1) + "\n")


def demo_lines() -> str:
    run = load("demo-cpu.json")
    end, seconds = run["summary"], run["summary"]["seconds"]
    share = seconds["passes"] / (seconds["passes"] + seconds["forwards"])
    return (
        f"accuracy on {run['data']['eval']} held-out sentences "
        f"**{end['accuracy_before']:.1%} -> {end['accuracy_after']:.1%}** "
        f"in {seconds['training']:.0f} seconds of training on {run['machine']['threads']} cores ({end['steps']} steps, "
        f"{end['counters']['forwards']} forwards, no backward); {share:.0%} of that time "
        "goes to the passes over the weights."
    )


SUBJECTS = (
    benchmarks.kernels.page, benchmarks.steps.page, benchmarks.steps.passes, benchmarks.gpu.page, benchmarks.layers.run,
    benchmarks.replay.run, benchmarks.drift.run, benchmarks.rounding.page, benchmarks.convergence.page,
    benchmarks.llm.beside_page, benchmarks.llm.demo, benchmarks.llm.page, benchmarks.llm.page_cpu,
    benchmarks.llm.papers, benchmarks.llm.picture_cpu,
    benchmarks.machine_code.page, benchmarks.machine_code.amd_page, benchmarks.trainer.run,
    benchmarks.rewards.page, benchmarks.choose.page,
    benchmarks.lowrank.learning, benchmarks.lowrank.speed, benchmarks.lowrank.populations, benchmarks.lengths.run,
    benchmarks.ranks.speed, benchmarks.ranks.scale, benchmarks.steps.host, benchmarks.matrix, benchmarks.arm.page,
    benchmarks.memory.page, benchmarks.memory.placed_page, benchmarks.front.page,
    docs.from_code,
)  # fmt: skip
PAGES: dict[str, dict[str, Callable[[], str]]] = {"README.md": {"demo": demo_lines}}
for subject in SUBJECTS:
    for name, made in subject.PAGES.items():
        PAGES.setdefault(name, {}).update(made)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)} (default: all)")
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the pages are up to date")
    parser.add_argument("--demo", type=Path, help="run.json of a demo run to keep in benchmarks/results")
    args = parser.parse_args(arguments)
    if unknown := [page for page in args.pages if page not in PAGES]:
        parser.error(f"nothing is made of {', '.join(unknown)}; the pages are {', '.join(PAGES)}")
    if args.demo is not None:
        store_demo(args.demo)
    chosen = args.pages or list(PAGES)
    wrong = [page for page in chosen if not write(page, PAGES[page], check=args.check)]
    if args.check and wrong:
        print(f"not what this would write: {', '.join(wrong)}; run python -m benchmarks.pages")
    for subject in SUBJECTS:
        if hasattr(subject, "draw") and not args.check and set(chosen) & subject.PAGES.keys():
            subject.draw()
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""Writes the figures of README.md and docs/ from benchmarks/results/*.json, so that they cannot disagree.

python benchmarks/readme_tables.py           # rewrites the pages and draws the pictures of docs/benchmarks.md
python benchmarks/readme_tables.py --check   # exit code 1 if a page is not what this would write
python benchmarks/readme_tables.py --demo demo-out/run.json   # keeps that demo run as the one that README.md tells of
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import targets
from bench_tables import draw, kernel_headlines, kernels_cpu, kernels_gpu
from pages import RESULTS, load, update


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


def layers_table() -> str:
    run = load("layers-cpu.json")
    settings = run["settings"]
    lines = [
        f"{settings['parameters'] / 1e6:.0f} million parameters ({settings['dtype']}), {settings['share_in_blocks']:.0%} "
        f"of them in {settings['blocks']} blocks, one run on {run['machine']['threads']} threads of an "
        f"{run['machine']['processor']} (`python benchmarks/bench_layers.py`); a step's passes with all that Python does "
        "around them, over those of a step that drops nothing:",
        "",
        "| blocks dropped | elements moved | time |",
        "|---|---|---|",
    ]
    for name, t in run["results"].items():
        lines.append(f"| {name} | {t['elements_share']:.3f} | {t['share_of_full']:.3f} |")
    return "\n".join(lines)


def replay_lines() -> str:
    run = load("replay-cpu.json")
    told = " and ".join(f"{r['step_over_pass']:.2f} ({name})" for name, r in run["results"].items())
    return (
        f"Measured with `python benchmarks/bench_replay.py` on {run['machine']['threads']} threads of an "
        f"{run['machine']['processor']}, {run['settings']['parameters'] / 1e6:.0f} million parameters: a replayed step "
        f"takes {told} of the time of one update pass."
    )


def gpu_step_lines() -> str:
    """Whole steps on a GPU: of a large model in place, of a smaller one from a CUDA graph."""
    large, small = load("step-cuda-opt-13b.json"), load("step-cuda-opt-1.3b.json")

    def told(run: dict[str, Any], case: str, way: str) -> str:
        theirs, ours = (run["results"][f"{case} {w}"]["step"]["median"] for w in ("published", way))
        return f"{1e3 * ours:.3g} ms, published {1e3 * theirs:.4g} ms: **{theirs / ours:.1f} x**"

    return "\n".join([
        f"Whole steps on the {large['machine']['gpu'].removeprefix('NVIDIA ')}, bfloat16 ([all of them](docs/steps.md)):",
        "",
        "| model, tokens | MeZO | HiZOO |",
        "|---|---|---|",
        *(f"| {title} | {told(run, f'{case} mezo', way)} | {told(run, f'{case} hizoo', way)} |"
          for title, run, case, way in (("OPT-13B, 16 x 256", large, "opt-13b 16x256", "inplace"),
                                        ("OPT-1.3B, 16 x 256, in a CUDA graph", small, "opt-1.3b 16x256", "graphed"),
                                        ("OPT-1.3B, 16 x 32, in a CUDA graph", small, "opt-1.3b 16x32", "graphed"))),
    ])  # fmt: skip


def step_lines() -> str:
    """Of the demo's model, in the published order and in place."""
    run = load("step-cpu.json")
    theirs, ours = (run["results"][f"demo 16x32 mezo {way}"] for way in ("published", "inplace"))
    shares = [r["passes"] / r["step"]["median"] for r in (theirs, ours)]
    faster = theirs["step"]["median"] / ours["step"]["median"]
    return (
        f"Of a whole MeZO step on the demo's model ({ours['parameters'] / 1e6:.1f} million parameters, {ours['tokens']} "
        f"tokens, {run['machine']['threads']} threads) the passes take {shares[1]:.0%}; in the published order of work "
        f"they take {shares[0]:.0%}, and the step {faster:.1f} times as long ([steps](docs/steps.md))."
    )


PAGES = {
    "docs/journal.md": {"replay": replay_lines},
    "docs/benchmarks.md": {"kernels-cpu": kernels_cpu, "kernels-gpu": kernels_gpu, "targets": targets.table},
    "README.md": {"kernels": kernel_headlines, "step-gpu": gpu_step_lines, "step": step_lines, "demo": demo_lines},
    "docs/methods/lezo.md": {"layers": layers_table},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the pages are up to date")
    parser.add_argument("--demo", type=Path, help="run.json of a demo run to keep in benchmarks/results")
    args = parser.parse_args()
    if args.demo is not None:
        store_demo(args.demo)
    made = {page: {name: make() for name, make in parts.items()} for page, parts in PAGES.items()}
    code = update(made, "readme_tables.py", check=args.check)
    if not args.check:
        draw()
    return code


if __name__ == "__main__":
    sys.exit(main())

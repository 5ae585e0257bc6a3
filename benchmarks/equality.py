"""Compares backends bit for bit on every rule, dtype, rounding, distribution and number of seeds, at large sizes.

python benchmarks/equality.py --device cuda                 # CUDA and Triton against the CPU backend, 50 million elements
python benchmarks/equality.py --device cpu --elements 3000  # the CPU backend and Triton's interpreter against NumPy

Cases come in a fixed shuffled order, so that a run which --time-limit or Ctrl-C cuts short has some of every kind. Prints
a line for each rule and backend and writes all cases as JSON, also where one of --jobs was killed. Exit code 0: all bits
that were compared are equal, and nothing but --time-limit ended the run.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"cuda": 50_000_000, "cpu": 3000}
CANDIDATES = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "triton")}
BASELINE = {"cuda": "cpu", "cpu": "reference"}
CUT_FOR_MANY_SEEDS = 16  # a case of 33 seeds or more takes this share of the elements


def compare(case: Any, elements: int, device: Any, baseline: str, candidates: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each candidate: elements compared, how many differ, and where the first of them is."""
    import pass_cases

    if case.seeds > 30:
        elements = max(elements // CUT_FOR_MANY_SEEDS, 100)
    start = pass_cases.inputs(case, elements, device)
    wanted = pass_cases.apply(case, pass_cases.copy(start, pass_cases.CPU), baseline)
    rows = []
    for backend in candidates:
        got = pass_cases.apply(case, pass_cases.copy(start, device), backend)
        row = {**case.label(), "backend": backend, "against": baseline, "elements": 0, "different": 0, "first": None}
        for number, (mine, want) in enumerate(zip(got, wanted, strict=True)):
            wrong = pass_cases.different(mine, want.to(device))
            count = int(wrong.sum())
            if count and row["first"] is None:
                at = int(wrong.nonzero()[0])
                row["first"] = {"tensor": number, "element": at, "got": float(mine[at]), "wanted": float(want[at])}
            row["elements"] += mine.numel()
            row["different"] += count
        rows.append(row)
    return rows


def _worker(threads: int, search: list[str]) -> None:
    """What a process of the pool needs before its first case."""
    sys.path[:] = search
    import torch

    torch.set_num_threads(threads)


def _task(end: float, *arguments: Any) -> list[dict[str, Any]] | None:
    if time.monotonic() >= end:
        return None
    try:
        return compare(*arguments)
    except Exception as error:  # a kernel that does not compile or launch is this case's result, and the others go on
        row = {"backend": "?", "against": "?", "elements": 0, "different": 0, "first": None}
        return [{**arguments[0].label(), **row, "error": f"{type(error).__name__}: {error}"[:400]}]


def results(jobs: int, end: float, cases: Sequence[Any], *rest: Any) -> Iterator[list[dict[str, Any]] | None]:
    """The rows of each case, None for those that the time did not suffice for; `jobs` processes at once.

    Several, because Triton's compiler takes a second for each kernel and most cases are another kernel.

    Raises:
        BrokenExecutor: one of the processes was killed, when all that was compared has been given.
    """
    if jobs == 1:
        yield from (_task(end, case, *rest) for case in cases)
        return
    threads = max((os.cpu_count() or jobs) // jobs, 1)
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    with ProcessPoolExecutor(jobs, context, _worker, (threads, sys.path)) as pool:
        died = None
        try:
            for future in as_completed([pool.submit(_task, end, case, *rest) for case in cases]):
                error = future.exception()
                if isinstance(error, BrokenExecutor):  # of all that were waiting, too
                    died = error
                else:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if died is not None:
            raise died


def is_wrong(row: dict[str, Any]) -> bool:
    return row["different"] > 0 or "error" in row


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each rule and backend. Plain text: a library for tables may be missing where this has to run."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["rule"], row["backend"], row["against"]].append(row)
    lines = [f"{'rule':<14}{'backend':<9}{'against':<11}{'cases':>6}{'elements':>16}{'different':>12}"]
    for (rule, backend, against), group in sorted(found.items()):
        elements, wrong = sum(r["elements"] for r in group), sum(r["different"] for r in group)
        lines.append(f"{rule:<14}{backend:<9}{against:<11}{len(group):>6}{elements:>16,}{wrong:>12,}")
    lines += [f"WRONG: {row}" for row in rows if is_wrong(row)][:10]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--elements", type=int, help=f"of each case, about (default: {SIZES})")
    parser.add_argument("--rules", nargs="+", help="rules of zokern/contract/rules.py (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 3], help="numbers of seeds (default: 1 3)")
    parser.add_argument("--backends", nargs="+", help=f"which to compare (default: {CANDIDATES})")
    parser.add_argument("--cases", type=int, help="no more than so many cases")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compare at once (default: 1)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop between cases when these are over")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    sys.path.insert(0, str(ROOT))  # zokern may not be installed
    import pass_cases
    import torch

    from zokern import backends
    from zokern.bench import record
    from zokern.contract.rules import RULES

    if options.rules and (unknown := [name for name in options.rules if name not in RULES]):
        parser.error(f"--rules has {', '.join(unknown)}; the rules are {', '.join(RULES)}")
    device, baseline = torch.device(options.device), BASELINE[options.device]
    if options.device == "cuda":
        device = torch.device("cuda", 0)
    candidates = options.backends or CANDIDATES[options.device]
    for name, where in [(baseline, pass_cases.CPU), *((name, device) for name in candidates)]:
        if (reason := backends.unavailable_reason(name, where)) is not None:
            parser.error(f"backend {name} cannot run on {where}: {reason}")
    elements = options.elements or SIZES[options.device]
    cases = list(pass_cases.all_cases(options.rules or tuple(RULES), options.seeds))
    random.Random(0).shuffle(cases)
    cases = cases[: options.cases]
    rows: list[dict[str, Any]] = []
    stopped, done = None, 0
    end = begin + (options.time_limit or float("inf"))
    try:
        with contextlib.closing(results(options.jobs, end, cases, elements, device, baseline, candidates)) as found:
            for compared in found:
                done += compared is not None
                rows += compared or []
    except KeyboardInterrupt:
        stopped = "interrupted"
    except BrokenExecutor:
        stopped = "a process was killed (out of memory?); try fewer --jobs or --elements"
    if stopped is None and done < len(cases):
        stopped = "time limit"
    print("\n".join(report(rows)))
    print(f"{done} of {len(cases)} cases" + (f", then: {stopped}" if stopped else ""))
    if options.output:
        settings = {"elements": elements, "cases": len(cases), "compared": done, "stopped": stopped}
        record.store("equality", device, settings, rows, options.output)
    wrong = any(map(is_wrong, rows))
    return 1 if wrong or not rows or stopped not in (None, "time limit") else 0


if __name__ == "__main__":
    sys.exit(main())

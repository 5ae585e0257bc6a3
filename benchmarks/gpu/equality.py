"""Compares backends bit for bit on every rule, dtype, rounding, distribution and number of seeds, at large sizes.

python -m benchmarks.gpu.equality --device cuda    # CUDA and Triton against the CPU backend, 50 million elements
python -m benchmarks.gpu.equality --device cpu     # the CPU backend and Triton's interpreter against NumPy, 3,000

Cases come in a fixed shuffled order, so that a run which --time-limit or Ctrl-C cuts short has some of every kind. Prints
a line for each rule and backend and writes all cases as JSON, also where one of --jobs was killed. Exit code 0: all bits
that were compared are equal, and nothing but --time-limit ended the run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from typing import Any

from benchmarks import study

SIZES = {"cuda": 50_000_000, "cpu": 3000}
CANDIDATES = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "triton")}
BASELINE = {"cuda": "cpu", "cpu": "reference"}
CUT_FOR_MANY_SEEDS = 16  # a case of 33 seeds or more takes this share of the elements


def _threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _task(end: float, case: Any, elements: int, *rest: Any) -> list[dict[str, Any]] | None:
    from benchmarks.gpu import cases

    if time.monotonic() >= end:
        return None
    if case.seeds > 30:
        elements = max(elements // CUT_FOR_MANY_SEEDS, 100)
    try:
        return cases.compare(case, elements, *rest)
    except Exception as error:  # a kernel that does not compile or launch is this case's result, and the others go on
        row = {"backend": "?", "against": "?", "elements": 0, "different": 0, "first": None}
        return [{**case.label(), **row, "error": f"{type(error).__name__}: {error}"[:400]}]


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
    with ProcessPoolExecutor(jobs, context, _threads, (threads,)) as pool:
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
    begin = time.monotonic()
    parser = study.parser(
        __doc__, "where the JSON goes", device=study.DEVICES, elements=(int, f"of each case, about (default: {SIZES})"),
        seeds=([1, 3], "numbers of seeds (default: 1 3)"), cases=(int, "no more than so many cases"),
        jobs=(1, "processes that compare at once"), time_limit=(float, "seconds after which no case is begun"),
    )  # fmt: skip
    parser.add_argument("--rules", nargs="+", help="rules of zokern/contract/rules.py (default: all)")
    parser.add_argument("--backends", nargs="+", help=f"which to compare (default: {CANDIDATES})")
    options = parser.parse_args(arguments)
    device, baseline = study.torch_device(options.device), BASELINE[options.device]

    from benchmarks.gpu import cases
    from zokern.bench import record
    from zokern.contract.rules import RULES

    if options.rules and (unknown := [name for name in options.rules if name not in RULES]):
        parser.error(f"--rules has {', '.join(unknown)}; the rules are {', '.join(RULES)}")
    candidates = options.backends or CANDIDATES[options.device]
    cases.require(parser, [baseline], cases.CPU)
    cases.require(parser, candidates, device)
    elements = options.elements or SIZES[options.device]
    chosen = list(cases.all_cases(options.rules or tuple(RULES), options.seeds))
    random.Random(0).shuffle(chosen)
    chosen = chosen[: options.cases]
    rows: list[dict[str, Any]] = []
    stopped, done = None, 0
    end = begin + (options.time_limit or float("inf"))
    found = results(options.jobs, end, chosen, elements, device, device, baseline, candidates)
    try:
        with contextlib.closing(found):
            for compared in found:
                done += compared is not None
                rows += compared or []
    except KeyboardInterrupt:
        stopped = "interrupted"
    except BrokenExecutor:
        stopped = "a process was killed (out of memory?); try fewer --jobs or --elements"
    if stopped is None and done < len(chosen):
        stopped = "time limit"
    print("\n".join(report(rows)))
    print(f"{done} of {len(chosen)} cases" + (f", then: {stopped}" if stopped else ""))
    if options.output:
        settings = {"elements": elements, "cases": len(chosen), "compared": done, "stopped": stopped}
        record.store("equality", device, settings, rows, options.output)
    return 1 if any(map(is_wrong, rows)) or not rows or stopped not in (None, "time limit") else 0


if __name__ == "__main__":
    sys.exit(main())

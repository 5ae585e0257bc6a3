"""One process's share of the cases, as lines of JSON for __main__.py to add up: python -m tests.ptx.worker cuda 90 1/1

A worker is a process of its own because emulation changes the process for good, for one backend and one architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("TRITON_INTERPRET", None)

from .target import architecture

Check = tuple[str, Callable[[], list[str]]]  # what is checked, and what is wrong with it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=["cuda", "triton"])
    parser.add_argument("arch", type=architecture)
    parser.add_argument("part", help="2/3: the second of three workers that share the cases")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--no-registers", action="store_true", help="say nothing of registers that may be unset")
    parser.add_argument("--only", default="", help="cases whose description has all of these words")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--peer", default="cpu", choices=["cpu", "reference"])
    options = parser.parse_args()
    until = time.monotonic() + options.seconds

    import torch

    from . import cuda_host, triton_host
    from .emulator import Emulator

    torch.set_num_threads(1)
    emulator = Emulator(options.arch)
    backend = (cuda_host if options.backend == "cuda" else triton_host).install(emulator)
    part, parts = map(int, options.part.split("/"))
    wanted = options.only.split()
    mine = [c for c in checks(options, backend, emulator) if all(word in c[0] for word in wanted)][part - 1 :: parts]
    say({"total": len(mine)})
    left = 0
    for name, check in mine:
        if time.monotonic() >= until:
            left += 1
            continue
        start = time.perf_counter()
        try:
            wrong = check()
        except Exception as error:  # a fault of a kernel, or something unknown in it: said, and the next one tried
            wrong = [f"{type(error).__name__}: {error}", *traceback.format_exc().splitlines()[-6:-1]]
        emulator.launches.clear()  # thousands of reports are not needed again
        say({"case": name, "seconds": time.perf_counter() - start, "wrong": wrong})
    from zokern.backends import native

    say(
        {
            "left": left,
            "sizes": {name: emulator.programs[name].sizes for name in emulator.covered},
            "covered": {name: sorted(blocks) for name, blocks in emulator.covered.items()},
            "kernels": len(native.extension.texts) if options.backend == "cuda" else None,
            "unset": [] if options.no_registers else emulator.unset(),
        }
    )


def checks(options: argparse.Namespace, backend: Any, emulator: Any) -> Iterator[Check]:
    """All that there is to do, each with its name."""
    from zokern.backends import module, native

    from . import compare, lint, selection, steps

    peer = module(options.peer)
    if options.backend == "cuda":
        yield "PTX", lambda: lint.in_ptx(native.extension.texts)
    for first, words in compare.CHECKSUMS[1:2] if options.quick else compare.CHECKSUMS:
        yield (
            f"checksum {first} {words}",
            lambda first=first, words=words: compare.checksum(options.backend, emulator, first, words),
        )
    cases = list((selection.quick if options.quick else selection.everything)(options.backend))
    normal = next(c for c in cases if c.distribution == "normal" and c.k and c.enabled != 0 and c.limits is None)
    yield (
        "a changed kernel is noticed",
        lambda: compare.notices(normal, options.backend, backend, peer, emulator),
    )
    for case in cases:
        yield str(case), lambda case=case: compare.compare(case, options.backend, backend, peer, emulator)
    for some in steps.EVERY if options.steps else ():
        yield f"steps {some}", lambda some=some: steps.compare(some, options.backend, emulator)


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main()

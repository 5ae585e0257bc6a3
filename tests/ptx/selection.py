"""Which cases are run: everything, in the order in which it says most, or a fixed few that take seconds."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from .cases import BF16, F16, F32, LAYOUTS, NUM_LIMITS, ROWS, STACKS, Case

RULES = ("axpy", "scaled_axpy", "hizoo", "hizoo_restore", "helene", "momentum", "adam", "adamezo", "sign")
WITH_V = {"hizoo", "hizoo_restore", "helene", "adamezo"}
WITH_TWO_STATES = {"helene", "adam"}
APART = {*ROWS, *STACKS, *(n for n in LAYOUTS if "rare" in n)}  # layouts that have cases of their own
STAGED = 128  # directions that a block of CUDA's keeps in shared memory; also the most that a chain has


def states_of(rule: str) -> tuple[torch.dtype, ...]:
    return (F32, BF16) if rule in ("scaled_axpy", "hizoo", "hizoo_restore") else (F32,)


def roundings_of(dtype: torch.dtype) -> tuple[str, ...]:
    return ("nearest",) if dtype == F32 else ("nearest", "stochastic")


def _draw(name: str) -> random.Random:
    return random.Random(zlib.crc32(name.encode()))


def passes() -> Iterator[Case]:
    """Every rule, dtype, distribution, rounding and number of directions; the rest is drawn."""
    for rule, dtype in itertools.product(RULES, (BF16, F32, F16)):
        kinds = itertools.product(states_of(rule), ("normal", "rademacher"), roundings_of(dtype), (0, 1, 2, 5, 33))
        for state, distribution, rounding, k in kinds:
            base = Case(rule, dtype, state, distribution, rounding, k)
            draw = _draw(str(base))
            layout = draw.choice(
                [n for n in LAYOUTS if n not in APART and not (k == 33 and n in ("mixed", "whole", "many"))]
            )
            yield replace(
                base,
                layout=layout,
                out=draw.random() < 0.4,
                enabled=draw.choice((None, None, 1, 1, 0)) if draw.random() < 0.6 else None,
                device_seeds=draw.random() < 0.4,
                square_of_sum=rule in WITH_V and draw.random() < 0.4,
                keep_second=rule in WITH_TWO_STATES and draw.random() < 0.4,
                specials=draw.random() < 0.4,
                seed=draw.randrange(1 << 20),
            )


def one_seed() -> Iterator[Case]:
    """The common kind of pass: one direction whose seed the host knows, for which CUDA has kernels of their own. One of
    the two groups has no decay, which has a loop of its own."""
    for n, (rule, dtype) in enumerate(itertools.product(RULES, (BF16, F32, F16))):
        for state, rounding in itertools.product(states_of(rule), roundings_of(dtype)):
            for i, layout in enumerate(("shards", "small", "whole")):
                base = Case(rule, dtype, state, "normal", rounding, 1, layout, seed=2 * (n + i) + 1)
                yield replace(base, keep_second=(n + i) % 3 == 2, specials=(n + i) % 2 == 0, enabled=(None, 1, 0)[i])
            yield replace(base, layout="small", specials=True, seed=2 * n + 1)
            yield replace(base, layout="small", specials=True, seed=2 * n + 3)  # the other group has no decay
            if rule == "axpy":
                yield replace(base, layout="shards", distribution="rademacher")


def more_seeds() -> Iterator[Case]:
    """More directions than a block keeps in shared memory, as many, and one fewer; whole aligned tiles and cut ones."""
    numbers = (STAGED + 1, STAGED + 3, 200, STAGED, STAGED - 1)
    for n, (dtype, rule, k) in enumerate(itertools.product((BF16, F32, F16), RULES, numbers)):
        for state in states_of(rule):
            yield Case(
                rule,
                dtype,
                state,
                distribution=("normal", "rademacher")[n % 2],
                k=k,
                layout="pairs" if rule == "axpy" else "tiny",  # axpy's whole tiles are pairs of 512 blocks
                square_of_sum=n % 4 == 3,
                seed=n,
            )


def limits() -> Iterator[Case]:
    """Weights that come to lie at the edges of their dtype, in the kernels for one seed, in those for any, in chains."""
    for n, (rule, dtype) in enumerate(itertools.product(RULES, (F16, BF16))):
        for rounding, device, limit in itertools.product(roundings_of(dtype), (False, True), range(NUM_LIMITS)):
            state = states_of(rule)[(n + limit) % len(states_of(rule))]
            base = Case(
                rule, dtype, state, rounding=rounding, layout="edges", device_seeds=device, limits=limit, seed=n + limit
            )
            yield base
            if rule == "axpy":  # has kernels for either distribution
                yield replace(base, distribution="rademacher")
            if rule != "scaled_axpy" and limit % 2 == 0 and not device:
                yield replace(base, stages=1)
                yield replace(base, stages=1, fork=True)  # a perturbation has code of its own there


def rare() -> Iterator[Case]:
    """Words of the noise that a sample does not have, in every kernel that makes normals."""
    for rule, dtype in itertools.product(RULES, (F32, F16, BF16)):
        for state, rounding in itertools.product(states_of(rule), roundings_of(dtype)):
            base = Case(rule, dtype, state, "normal", rounding, 1, "rare", seed=3)  # one group has no decay
            yield base
            yield replace(base, k=2, square_of_sum=rule in WITH_V)
            if state == F32 and rounding == "nearest":
                yield replace(base, k=STAGED + 1)
            if rule == "axpy":  # its kernels for several seeds have tiles of two blocks a thread
                yield replace(base, layout="rare_pairs", k=2)
            if rule != "scaled_axpy" and rounding == "nearest":
                yield replace(base, k=2, stages=4)


def small_numbers() -> Iterator[Case]:
    """Bits that are lost beside numbers of the usual size: subnormal ones, and what cancels."""
    for rule, dtype in itertools.product(RULES, (F32, F16, BF16)):
        for state, rounding in itertools.product(states_of(rule), roundings_of(dtype)):
            base = Case(rule, dtype, state, "normal", rounding, 1, "small", seed=5)
            chain = replace(base, k=11, stages=1, seed=6)  # more than 9: it takes all of them
            for some in (replace(base, residual=True), replace(base, subnormal=True)):
                yield some
                yield replace(some, k=2, device_seeds=True, enabled=1)
                if rule == "axpy":
                    yield replace(some, distribution="rademacher")
                    yield replace(some, distribution="rademacher", k=2, enabled=1)
            if rule != "scaled_axpy":
                yield replace(chain, residual=True)
                yield replace(chain, subnormal=True)


def layouts() -> Iterator[Case]:
    """The common kernels on every layout, in and out of place, with and without special values."""
    for dtype, rounding in ((d, rounding) for d in (BF16, F32, F16) for rounding in roundings_of(d)):
        for n, (layout, k) in enumerate(
            itertools.product((n for n in LAYOUTS if "rare" not in n and n not in STACKS), (1, 2))
        ):
            for i, distribution in enumerate(("normal", "rademacher")):
                # An odd seed leaves one of the two groups without a decay, which has a loop of its own.
                base = Case("axpy", dtype, F32, distribution, rounding, k, layout, seed=n // 2)
                yield replace(base, out=n % 2 == i, specials=n % 3 == i)


def chains() -> Iterator[Case]:
    for rule, dtype in itertools.product(RULES, (BF16, F32, F16)):
        if rule == "scaled_axpy":
            continue  # it is a part of hizoo's
        for state in states_of(rule):
            for salt, (fork, enabled) in enumerate(2 * ((False, None), (True, None), (True, 0), (False, 1))):
                base = Case(rule, dtype, state, fork=fork, enabled=enabled)
                draw = _draw(f"{base} {salt}")
                yield replace(
                    base,
                    stages=draw.choice((1, 2, 3, 3, 4)) if enabled != 1 else draw.choice((2, 7, 32)),
                    distribution=draw.choice(("normal", "rademacher")),
                    rounding=draw.choice(roundings_of(dtype)),
                    k=draw.choice((2, 3, 9)),
                    layout=draw.choice(("small", "shards", "far", "one", "mixed")) if enabled != 1 else "one",
                    square_of_sum=draw.random() < 0.3,
                    keep_second=draw.random() < 0.3,
                    specials=draw.random() < 0.35,
                    seed=draw.randrange(1 << 20),
                )
            for distribution in ("normal", "rademacher"):
                yield Case(rule, dtype, state, distribution, k=2, layout="far", stages=2, seed=5)
            # As many directions as a chain may have, in two stages and in many.
            yield Case(rule, dtype, state, k=STAGED, layout="tiny", stages=2, seed=3)
            yield Case(rule, dtype, state, distribution="rademacher", k=11, layout="tiny", stages=12, fork=True, seed=4)


def strided() -> Iterator[Case]:
    """Shards along the last dimension, in the kernels for one seed, in those for any, and in chains."""
    for n, (rule, dtype) in enumerate(itertools.product(RULES, (BF16, F32, F16))):
        for state, rounding in itertools.product(states_of(rule), roundings_of(dtype)):
            base = Case(rule, dtype, state, "normal", rounding, 1, "rows", seed=2 * n + 1)
            yield replace(base, out=n % 2 == 0, keep_second=n % 3 == 0)
            yield replace(
                base, distribution=("rademacher", "normal")[n % 2], k=3, device_seeds=True, out=n % 2 == 1,
                square_of_sum=rule in WITH_V and n % 2 == 0, enabled=1,
            )  # fmt: skip
            if rule == "axpy":
                yield replace(base, distribution="rademacher")
                yield replace(base, k=2)
            if rule != "scaled_axpy":
                yield replace(base, stages=3, k=3, fork=n % 2 == 0)


def low_rank() -> Iterator[Case]:
    """Directions of low rank: every kernel with several ranks, numbers of directions and layouts."""
    layouts = ("low_small", "low", "low_rows", "low_thin")
    for n, (rule, dtype) in enumerate(itertools.product(RULES, (BF16, F32, F16))):
        for state, rounding in itertools.product(states_of(rule), roundings_of(dtype)):
            for i, (rank, k) in enumerate(((1, 1), (2, 3), (4, 2), (1, 0), (4, 1), (3, 17))):
                layout = "low_tiny" if k > 3 else layouts[(n + i) % (4 if rank == 1 else 3)]
                base = Case(rule, dtype, state, f"lowrank:{rank}", rounding, k, layout, seed=2 * n + i)
                yield replace(
                    base,
                    out=(n + i) % 3 == 0,
                    device_seeds=i % 2 == 1,
                    enabled=(None, 1, None, 0, 1, None)[(n + i) % 6],
                    square_of_sum=rule in WITH_V and (n + i) % 2 == 0,
                    keep_second=rule in WITH_TWO_STATES and (n + i) % 3 == 1,
                    specials=i in (0, 2),
                )
            if rule == "scaled_axpy":
                continue
            for i, (rank, fork, enabled) in enumerate(((2, True, None), (1, False, None), (4, True, 0), (1, True, 1))):
                layout = layouts[(n + i) % (4 if rank == 1 else 3)]
                base = Case(rule, dtype, state, f"lowrank:{rank}", rounding, 2 + i % 2, layout, seed=n + i)
                yield replace(base, fork=fork, enabled=enabled, stages=(3, 2, 2, 7)[i], specials=i == 0)
            # As many directions as a chain may have.
            yield Case(rule, dtype, state, "lowrank:2", rounding, STAGED, "low_tiny", stages=2, seed=3)
    for dtype in (BF16, F32):
        yield Case("axpy", dtype, F32, "lowrank:1", k=1, layout="low_far", seed=1)
        yield Case("axpy", dtype, F32, "lowrank:4", k=3, layout="low", out=True, residual=True)
        yield Case("sign", dtype, F32, "lowrank:2", k=2, layout="low_far", stages=2, seed=1)


SOURCES: tuple[Callable[[], Iterator[Case]], ...] = (
    passes,
    one_seed,
    more_seeds,
    chains,
    strided,
    layouts,
    limits,
    rare,
    small_numbers,
    low_rank,
)


def everything(backend: str) -> Iterator[Case]:
    """All kinds side by side, so that a run that is cut short has seen some of each."""
    groups = [list(source()) for source in SOURCES]
    draw = random.Random(backend)
    for some in groups:
        draw.shuffle(some)
    order = sorted((n / len(some), i, n) for i, some in enumerate(groups) for n in range(len(some)))
    for case in dict.fromkeys(groups[i][n] for _, i, n in order):  # without those that two sources have
        yield case
        if (
            backend == "triton"
            and not case.stages
            and case.limits is None
            and "rare" not in case.layout
            and not case.residual
        ):
            # What it was compiled for serves other layouts and numbers too.
            for layout, k in (("low_rows", 3), ("low_tiny", 2)) if case.rank else (("shards", 3), ("tiny", 2)):
                yield replace(case, layout=layout, k=k if case.k else 0, enabled=None if case.enabled is None else 1)


def quick(backend: str) -> Iterator[Case]:
    """A kernel of each kind for each rule. Triton has one kernel for any number of directions, and each takes a second to
    compile, so a rule has a pass there or a chain."""
    dtypes, edge = (BF16, F16, F32), Case("sign", F16, layout="edges", limits=0)
    for n, rule in enumerate(RULES):
        dtype, state = dtypes[n % 3], states_of(rule)[-1]
        rounding = roundings_of(dtype)[-1]
        v, two = rule in WITH_V, rule in WITH_TWO_STATES
        more = Case(
            rule, dtypes[(n + 2) % 3], state, ("normal", "rademacher")[n % 2], k=(129, 131, 200)[n // 3],
            layout="pairs" if rule == "axpy" else "tiny", square_of_sum=v and n % 2 == 0, seed=n,
        )  # fmt: skip
        any_seeds = Case(
            rule, dtypes[(n + 1) % 3], F32, ("rademacher", "normal")[n % 2], k=2 + n % 2, layout="shards", out=True,
            device_seeds=True, square_of_sum=v, keep_second=two, enabled=1, seed=n,
        )  # fmt: skip
        chain = Case(rule, dtype, state, rounding=rounding, k=3, layout="small", stages=3, fork=n % 2 == 0, seed=n)
        if backend == "cuda":
            yield Case(rule, dtype, state, "normal", rounding, 1, "small", specials=True, seed=2 * n + 1)
            yield any_seeds
            yield more
            if rule != "scaled_axpy":
                yield chain
        elif rule == "sign":
            yield edge
        else:
            yield more if rule in ("axpy", "momentum", "adam") else replace(any_seeds, device_seeds=False)
            if rule == "axpy":
                yield chain
                yield Case(rule, F16, F32, "normal", "stochastic", layout="rows", seed=1)
                yield Case(rule, BF16, F32, "lowrank:1", k=2, layout="low_rows", seed=1)
                yield Case(rule, BF16, F32, "lowrank:1", k=2, layout="low_tiny", stages=2, seed=1)
    if backend == "cuda":
        yield replace(edge, rule="axpy")
        yield replace(edge, limits=2, rounding="stochastic", device_seeds=True)
        yield replace(edge, rule="axpy", limits=1, dtype=BF16)
        yield Case("axpy", BF16, layout="whole", seed=1)
        yield Case("axpy", BF16, layout="rows", seed=1)
        yield Case("axpy", F32, k=3, layout="rows", out=True, seed=1)
        yield Case("hizoo", F16, k=3, layout="rows", stages=3, fork=True, seed=2)
        yield Case("axpy", F32, layout="rare", seed=3)
        yield Case("axpy", BF16, layout="small", residual=True, seed=5)
        yield Case("sign", F32, layout="small", subnormal=True, seed=5)
        yield Case("axpy", F32, F32, "rademacher", layout="far")
        yield Case("axpy", BF16, F32, "normal", "stochastic", 2, "mixed", seed=3)
        yield Case("axpy", BF16, F32, "lowrank:2", k=2, layout="low", seed=1)
        yield Case("axpy", F16, F32, "lowrank:1", "stochastic", layout="low_thin", device_seeds=True, seed=2)
        yield Case("axpy", F32, F32, "lowrank:4", layout="low_rows", out=True, enabled=1, seed=3)
        yield Case("hizoo", BF16, BF16, "lowrank:3", "stochastic", 2, "low_small", square_of_sum=True, seed=4)
        yield Case("adam", F16, F32, "lowrank:2", k=2, layout="low_small", stages=3, fork=True, seed=5)

"""Chains: several passes in registers give the bits of the passes one by one, on every backend."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from tests.devices import DTYPES
from tests.launching import launch, launch_chain
from tests.pairs import by_backend, label
from zokern import directions
from zokern.backends import native
from zokern.contract.rules import RULES
from zokern.passes.spec import MAX_CHAIN_SEEDS, MAX_STAGES, PassNumbers, PassSpec, rule_of_probes

CHAINED = [rule for rule in RULES if rule != "scaled_axpy"]
GROUPS = 2


def stage(
    rule_name: str, draw: random.Random, seeds: int, distribution: str, stochastic: bool
) -> tuple[PassSpec, PassNumbers]:
    rule = RULES[rule_name]
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    coefs = torch.randn(GROUPS, len(rule.coefs), seeds, generator=generator) * 0.1
    if "V" in rule.coefs:
        coefs[:, -1] = coefs[:, -1].abs()
    shared = torch.rand(GROUPS, len(rule.scalars), generator=generator) * 0.5 + 0.5
    kind = PassSpec(
        rule,
        directions.parse(distribution),
        "stochastic" if stochastic else "nearest",
        square_of_sum="V" in rule.coefs and draw.random() < 0.5,
        keep_second=rule.written == 2 and draw.random() < 0.5,
    )
    numbers = torch.randint(0, 1 << 62, (seeds + 2,), generator=generator)
    return kind, PassNumbers(numbers[:seeds], coefs, shared, numbers[seeds:])


def one_by_one(tensors, states, stages, where, *, probes=(), enabled=None):
    """The reference: each pass alone, through memory."""
    last = len(stages) - bool(probes)
    for i, (kind, scalars) in enumerate(stages):
        at = list(range(len(tensors)))
        out = None
        if i == last:
            at = [j for j in at if probes[j] is not None]
            out = [probes[j] for j in at]
            if not at:
                return
        launch(
            [tensors[j] for j in at],
            out,
            states=[[state[j] for j in at] for state in states][: len(kind.rule.states)],
            tensor_ids=[where[j][0] for j in at],
            offsets=[where[j][1] for j in at],
            groups=[where[j][2] for j in at],
            seeds=scalars.seeds,
            coefs=scalars.coefs,
            shared=scalars.shared,
            rounding_seed=scalars.rounding_seed,
            enabled=enabled if i < last else None,
            rule=kind.rule.name,
            distribution=kind.direction.name,
            rounding=kind.rounding,
            square_of_sum=kind.square_of_sum,
            keep_second=kind.keep_second,
            backend="reference",
        )


@pytest.mark.parametrize(
    ("backend", "rule", "dtype", "fork"),
    by_backend(CHAINED, DTYPES, [False, True, "disabled"]), indirect=["backend"], ids=label,
)  # fmt: skip
def test_a_chain_gives_the_bits_of_its_passes(backend, device, dtype, rule, fork) -> None:
    compare(backend, device, dtype, rule, fork)


@pytest.mark.parametrize("isa", native.extension.cpu_instruction_sets()[1:])
@pytest.mark.parametrize("rule", ["axpy", "hizoo_restore", "helene"])
def test_every_instruction_set(isa, dtype, rule, monkeypatch) -> None:
    monkeypatch.setenv("ZOKERN_CPU_ISA", isa)
    compare("cpu", torch.device("cpu"), dtype, rule, True)


def compare(backend: str, device: torch.device, dtype: torch.dtype, rule: str, fork: bool | str) -> None:
    draw = random.Random(f"{rule} {dtype} {fork}")
    state_dtype = torch.bfloat16 if rule.startswith("hizoo") and draw.random() < 0.5 else torch.float32
    distribution = draw.choice(["normal", "rademacher"])
    helper = rule_of_probes(RULES[rule]).name
    names = [rule, helper, rule, helper, rule] if not fork else [rule, rule, helper]
    stages = [stage(n, draw, draw.choice([1, 2, 3]), distribution, draw.random() < 0.5) for n in names]
    if fork:
        stages[-1] = (replace(stages[-1][0], rounding="nearest"), stages[-1][1])
    # A whole aligned tensor, one off the 16-byte grid, a shard that starts within a block, one that spans two chunks
    sizes, where = [2048, 777, 100, 1000], [(0, 0, 0), (7, 0, 1), (8, 13, 0), (9, (1 << 14) - 333, 1)]
    base = torch.Generator().manual_seed(3)
    given = [torch.randn(n + 1, generator=base).to(dtype) for n in sizes]
    kept = [[torch.rand(n, generator=base).to(state_dtype) + 0.5 for n in sizes] for _ in RULES[rule].states]

    pairs = list(zip(given, sizes, strict=True))

    def fresh(where_to):
        tensors = [t.clone().to(where_to)[1 if i == 1 else 0 :][:n] for i, (t, n) in enumerate(pairs)]
        states = [[t.clone().to(where_to) for t in state] for state in kept]
        probes = [None if i == 2 else torch.zeros_like(t) for i, t in enumerate(tensors)] if fork else []
        enabled = torch.tensor([int(fork != "disabled")], dtype=torch.int32) if fork else None
        return tensors, states, probes, enabled

    tensors, states, probes, enabled = fresh("cpu")
    one_by_one(tensors, states, stages, where, probes=probes, enabled=enabled)
    got, got_states, got_probes, enabled = fresh(device)
    launch_chain(
        got,
        stages,
        tensor_ids=[w[0] for w in where],
        offsets=[w[1] for w in where],
        groups=[w[2] for w in where],
        rule=rule,
        states=got_states,
        probes=got_probes,
        enabled=None if enabled is None else enabled.to(device),
        backend=backend,
    )
    for expected, actual in zip(
        [*tensors, *itertools.chain(*states), *[p for p in probes if p is not None]],
        [*got, *itertools.chain(*got_states), *[p for p in got_probes if p is not None]],
        strict=True,
    ):
        assert expected.isfinite().all()
        assert torch.equal(expected, actual.cpu())
    if fork == "disabled":
        assert torch.equal(got[0].cpu(), given[0][:2048])
    else:
        assert not torch.equal(got[0].cpu(), given[0][:2048])


def test_limits_are_the_compiled_ones() -> None:
    assert (native.extension.max_stages, native.extension.max_chain_seeds) == (MAX_STAGES, MAX_CHAIN_SEEDS)

"""What the two backends of the compiled module share: its import, its enums, and the arguments of a pass."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zokern.contract.rules import RULES, Rule
from zokern.passes.spec import Chain, PassNumbers, PassSpec, rule_of_probes
from zokern.passes.table import Table

STAGE_COLUMNS = 10  # of stage_rows
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

Place = tuple[int, int, int]  # addresses of a table's rows and its chunks, and the number of these
Factors = tuple[int, int, int, int]  # addresses of factor rows and factors, numbers of a seed, rank
NO_FACTORS: Factors = (0, 0, 0, 0)

BUILD = "build it: pip install --no-build-isolation -e ."


def _described(rule: Rule) -> dict[str, object]:
    """As the extension describes its own."""
    return {
        "name": rule.name,
        "direct": rule.direct,
        "coefs": len(rule.coefs),
        "scalars": len(rule.scalars),
        "states": len(rule.states),
        "written": rule.written,
        "squares": rule.coefs.index("V") if "V" in rule.coefs else -1,
        "perturbation": rule_of_probes(rule).name,
        "half_state": rule.half_state,
    }


def _difference(built: list[dict[str, object]]) -> str | None:
    """Between an extension's rules and contract/rules.py: one of another order or shape would take numbers for others."""
    wanted = {rule.id: _described(rule) for rule in RULES.values()}
    for number in range(max(len(built), *(place + 1 for place in wanted))):
        ours, its = wanted.get(number), built[number] if number < len(built) else None
        if ours is None or its is None:
            name, where = (its or ours or {}).get("name"), "zokern/contract/rules.py" if ours is None else "the build"
            return f"rule {number} ({name}) is not in {where}"
        for key, value in ours.items():
            if its[key] != value:
                found = f"{its[key]!r} in the build, {value!r} in zokern/contract/rules.py"
                return f"rule {number} ({ours['name']}) has {key} {found}"
    return None


def hidden() -> str | None:
    """The remedy where this is a checkout's folder, which Python finds first when it is started in there."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "CMakeLists.txt").is_file() or any((checkout / "zokern").glob("_C.*so")):
        return None
    return (
        f"Python found the sources in {checkout} first, and nothing is built there. pip install -e . builds it there; what "
        "pip install . has installed is found from any other folder"
    )


def load() -> tuple[Any, str | None]:
    """zokern._C and None, or None and why it cannot be used."""
    try:
        module = importlib.import_module("zokern._C")
    except ImportError as error:
        return None, f"zokern._C cannot be imported ({error}); {hidden() or BUILD}"
    # An older build has no list of its rules.
    wrong = _difference(module.rules()) if hasattr(module, "rules") else "it does not say which rules it has"
    return (module, None) if wrong is None else (None, f"zokern._C is of another version: {wrong}; re{BUILD}")


extension, import_error = load()


def make_pass(
    table: Table, spec: PassSpec, numbers: PassNumbers, place: Place | None = None, factors: Factors = NO_FACTORS
) -> Any:
    """The pass as csrc/pass.h has it. place: of a piece of the table; factors: as factored.py made them for it."""
    seeds, rounding, enabled = numbers.seeds, numbers.rounding_seed, numbers.enabled
    return extension.Pass(
        table.place if place is None else place,
        spec.flags,
        seeds.data_ptr(),
        seeds.numel(),
        seeds.is_cpu,
        numbers.coefs.data_ptr(),
        numbers.shared.data_ptr(),
        0 if rounding is None else rounding.data_ptr(),
        rounding is None or rounding.is_cpu,
        0 if enabled is None else enabled.data_ptr(),
        factors,
    )


def make_chain(table: Table, chain: Chain, place: Place | None = None, factors: Factors = NO_FACTORS) -> Any:
    """The chain as csrc/pass.h has it; all numbers are in the memory of the table's device."""
    tensors, chunks, num_chunks = table.place if place is None else place
    return extension.Chain(
        tensors=tensors,
        chunks=chunks,
        num_chunks=num_chunks,
        enabled=0 if chain.enabled is None else chain.enabled.data_ptr(),
        rademacher=chain.stages[0][0].direction.name == "rademacher",
        fork=chain.fork,
        keep_second=chain.keep_second,
        factors=factors,
        stages=stage_rows(chain, factors),
    )


def stage_rows(chain: Chain, factors: Factors = NO_FACTORS) -> list[tuple[int, ...]]:
    """Addresses of seeds, coefs, scalars and rounding seeds; number of seeds; four flags; address of its factors, which
    follow those of the stage before: pass.h's Stage."""
    befores = itertools.accumulate(map(Tensor.numel, chain.seeds[:-1]), initial=0)
    return [
        (
            numbers.seeds.data_ptr(),
            numbers.coefs.data_ptr(),
            numbers.shared.data_ptr(),
            0 if numbers.rounding_seed is None else numbers.rounding_seed.data_ptr(),
            numbers.seeds.numel(),
            spec.rule != chain.rule,
            spec.rounding == "stochastic",
            spec.square_of_sum,
            spec.keep_second,
            factors[1] + 4 * factors[2] * before,
        )
        for (spec, numbers), before in zip(chain.stages, befores, strict=True)
    ]

"""What the two backends of the compiled module share: its import, its enums, and the arguments of a pass."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from zokern.backends.scalars import Chain, Kind, Scalars, perturbation
from zokern.rules import RULES, Rule
from zokern.table import Table

STAGE_COLUMNS = 9  # of stage_rows
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

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
        "perturbation": perturbation(rule).name,
    }


def _difference(built: list[dict[str, object]]) -> str | None:
    """Between an extension's rules and zokern/rules.py: one of another order or shape would take numbers for others."""
    wanted = {rule.id: _described(rule) for rule in RULES.values()}
    for number in range(max(len(built), *(place + 1 for place in wanted))):
        ours, its = wanted.get(number), built[number] if number < len(built) else None
        if ours is None or its is None:
            name, where = (its or ours or {}).get("name"), "zokern/rules.py" if ours is None else "the build"
            return f"rule {number} ({name}) is not in {where}"
        for key, value in ours.items():
            if its[key] != value:
                found = f"{its[key]!r} in the build, {value!r} in zokern/rules.py"
                return f"rule {number} ({ours['name']}) has {key} {found}"
    return None


def load() -> tuple[Any, str | None]:
    """zokern._C and None, or None and why it cannot be used."""
    try:
        module = importlib.import_module("zokern._C")
    except ImportError as error:
        return None, f"zokern._C cannot be imported ({error}); {BUILD}"
    # An older build has no list of its rules.
    wrong = _difference(module.rules()) if hasattr(module, "rules") else "it does not say which rules it has"
    return (module, None) if wrong is None else (None, f"zokern._C is of another version: {wrong}; re{BUILD}")


extension, import_error = load()


def make_pass(table: Table, kind: Kind, scalars: Scalars) -> Any:
    """The pass as csrc/pass.h has it. Seeds in host memory travel in the launch itself where there is but one."""
    seeds, rounding_seed = scalars.seeds, scalars.rounding_seed
    seed_known = seeds.device.type == "cpu" and seeds.numel() == 1
    rounding_known = rounding_seed is None or rounding_seed.device.type == "cpu"
    weights, state = rounding_seed.tolist() if rounding_seed is not None and rounding_known else (0, 0)
    return extension.Pass(
        tensors=table.tensors.data_ptr(),
        chunks=table.chunks.data_ptr(),
        num_chunks=table.chunks.shape[0],
        coefs=scalars.coefs.data_ptr(),
        scalars=scalars.shared.data_ptr(),
        seeds=0 if seed_known else seeds.data_ptr(),
        seed=int(seeds[0]) if seed_known else 0,
        num_seeds=seeds.numel(),
        rounding_seed=0 if rounding_known or rounding_seed is None else rounding_seed.data_ptr(),
        known_rounding_seed=weights,
        known_state_seed=state,
        enabled=0 if scalars.enabled is None else scalars.enabled.data_ptr(),
        rademacher=kind.distribution == "rademacher",
        stochastic=kind.rounding == "stochastic",
        square_of_sum=kind.square_of_sum,
        keep_second=kind.keep_second,
    )


def make_chain(table: Table, chain: Chain) -> Any:
    """The chain as csrc/pass.h has it; all numbers are in the memory of the table's device."""
    return extension.Chain(
        tensors=table.tensors.data_ptr(),
        chunks=table.chunks.data_ptr(),
        num_chunks=table.chunks.shape[0],
        enabled=0 if chain.enabled is None else chain.enabled.data_ptr(),
        rademacher=chain.stages[0][0].distribution == "rademacher",
        fork=chain.fork,
        keep_second=chain.keep_second,
        stages=stage_rows(chain),
    )


def stage_rows(chain: Chain) -> list[tuple[int, ...]]:
    """Addresses of seeds, coefs, scalars and rounding seeds; number of seeds; four flags: pass.h's Stage."""
    return [
        (
            scalars.seeds.data_ptr(),
            scalars.coefs.data_ptr(),
            scalars.shared.data_ptr(),
            0 if scalars.rounding_seed is None else scalars.rounding_seed.data_ptr(),
            scalars.seeds.numel(),
            kind.rule != chain.rule,
            kind.rounding == "stochastic",
            kind.square_of_sum,
            kind.keep_second,
        )
        for kind, scalars in chain.stages
    ]

"""What a journal may say. All that is read is looked at here, before anything is done with it: a file may be a stranger's.

Each check raises ValueError with what is wrong; the reader adds the file and the place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from zokern._checks import DTYPES, MAX_INDEX, MAX_SEED, MAX_TENSOR_ID, brief
from zokern.contract.rules import RULES
from zokern.contract.streams import ROUNDINGS, rank_of
from zokern.journal.format import FEATURES, MAX_NUMBERS
from zokern.passes.spec import MAX_PASS_SEEDS

CONTRACT = "zk1"
MAX_STEP = 1 << 62
MAX_ROWS = 1 << 20
MAX_EMPTY_BLOCKS = 1 << 10  # LeZO's blocks may have no parameters
_HASH = re.compile(r"[0-9a-f]{32}")
_WEIGHTS = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
_STATES = {name: sorted({dtype for rule in RULES.values() if name in rule.states for dtype in rule.state_dtypes})
           for rule in RULES.values() for name in rule.states}  # fmt: skip
_FLAGS = ("stochastic", "rounded", "square_of_sum", "keep_second", "deferred")


class NewerError(ValueError):
    """What a later zokern may know."""


def header(value: Mapping[str, Any]) -> None:
    """The noise contract, the features, and all that a replay takes from a header."""
    needed = value.get("features", [])
    if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
        raise ValueError("features is no list of names")
    unknown = sorted(set(needed) - FEATURES)
    if unknown:
        raise NewerError(f"it needs the feature {brief(unknown[0])}, which this zokern does not know")
    for name in ("contract", "method", "distribution", "placement"):
        _text(value.get(name), name)
    if value["contract"] != CONTRACT:
        raise NewerError(f"its noise contract is {brief(value['contract'])}, and this zokern knows {CONTRACT!r}")
    rank_of(value["distribution"])
    _integer(value.get("seed"), "seed", 0, MAX_SEED)
    _integer(value.get("first_step"), "first_step", 0, MAX_STEP)
    _hash(value.get("base"), "base")
    for name in ("options", "states"):
        if not isinstance(value.get(name), dict):
            raise ValueError(f"{name} is no object")
    rounding = value["options"].get("rounding", "auto")
    if rounding not in ("auto", *ROUNDINGS):
        raise ValueError(f"rounding is {brief(rounding)}, which is none of auto, {', '.join(ROUNDINGS)}")
    if not isinstance(value.get("about", {}), dict):
        raise ValueError("about is no object")
    for name, state in value["states"].items():
        if name not in _STATES:
            raise ValueError(f"a state is called {brief(name)}; passes keep {', '.join(_STATES)}")
        if not isinstance(state, list) or len(state) != 2:
            raise ValueError(f"state {name!r} is no dtype with an initial value")
        if state[0] not in _STATES[name]:
            raise ValueError(f"state {name!r} is {brief(state[0])}; a pass keeps it in {' or '.join(_STATES[name])}")
        _finite(state[1], f"the initial value of state {name!r}")


def layout(value: Mapping[str, Any]) -> None:
    """The parameters: [tensor id, name, shape, dtype, group, row key, block] each; LeZO's counts."""
    params, layers = value.get("params"), value.get("layers")
    if not isinstance(params, list) or "layers" not in value:
        raise ValueError("it has no list of params, or no layers")
    blocks = 0
    if layers is not None:
        if not isinstance(layers, list) or len(layers) != 2:
            raise ValueError("layers is no pair")
        blocks = _integer(layers[1], "the number of blocks", 0, len(params) + MAX_EMPTY_BLOCKS)
        _integer(layers[0], "the number of blocks left out", 0, blocks)
    names, ids = set(), set()
    for i, one in enumerate(params):
        if not isinstance(one, list) or len(one) != 7:
            raise ValueError(f"params[{i}] has not seven entries")
        tensor_id, name, shape, dtype, group, key, block = one
        ids.add(_integer(tensor_id, f"params[{i}]: tensor id", 0, MAX_TENSOR_ID))
        names.add(_text(name, f"params[{i}]: name"))
        if not isinstance(shape, list) or len(shape) > 64:
            raise ValueError(f"params[{i}]: shape is no list of sizes")
        numel = 1
        for size in shape:
            numel *= _integer(size, f"params[{i}]: a size", 1, MAX_INDEX)
            _integer(numel, f"params[{i}]: its number of elements", 1, MAX_INDEX)
        if dtype not in _WEIGHTS:
            raise ValueError(f"params[{i}]: dtype is {brief(dtype)}, which is none of {', '.join(_WEIGHTS)}")
        _integer(group, f"params[{i}]: group", 0, MAX_ROWS)
        if not (key is None or isinstance(key, (str, int)) or (isinstance(key, float) and math.isfinite(key))):
            raise ValueError(f"params[{i}]: row key is no name and no number")
        if block is not None:
            _integer(block, f"params[{i}]: block", 0, blocks - 1)
    if len(names) < len(params) or len(ids) < len(params):
        raise ValueError("two parameters have one name or one tensor id")


def signature(value: Mapping[str, Any], states: Mapping[str, list[Any]], folds: bool = False) -> int:
    """The passes of a step; returns how many numbers its frame has. states: the header's. folds: it has that feature."""
    memory = _integer(value.get("memory"), "memory", 0, MAX_NUMBERS)
    numbers = 2 * memory + _integer(value.get("groups"), "groups", 1, MAX_ROWS) + 1
    passes = value.get("passes")
    if not isinstance(passes, list):
        raise ValueError("passes is no list")
    for i, one in enumerate(passes):
        if not isinstance(one, dict) or not isinstance(one.get("rule"), str) or one["rule"] not in RULES:
            raise ValueError(f"passes[{i}] has no rule of {', '.join(RULES)}")
        rule, seeds = RULES[one["rule"]], one.get("seeds")
        for name in rule.states:
            if name not in states or states[name][0] not in rule.state_dtypes:
                kept = f"is {states[name][0]}" if name in states else "is missing in the header"
                raise ValueError(f"passes[{i}]: {rule.name} needs the state {name!r}, which {kept}")
        if not isinstance(seeds, list) or len(seeds) > MAX_PASS_SEEDS:
            raise ValueError(f"passes[{i}]: seeds is no list of directions")
        for seed in seeds:
            if not isinstance(seed, list) or len(seed) != 2:
                raise ValueError(f"passes[{i}]: a direction is no pair")
            _integer(seed[0], f"passes[{i}]: a direction's age", 0, MAX_STEP)
            _integer(seed[1], f"passes[{i}]: a direction's number", 0, MAX_TENSOR_ID)
        rows = _integer(one.get("rows"), f"passes[{i}]: rows", 1, MAX_ROWS)
        if any(not isinstance(one.get(flag, False), bool) for flag in _FLAGS):
            raise ValueError(f"passes[{i}]: a flag is neither true nor false")
        unknown = set(one) - {"rule", "seeds", "rows", *_FLAGS}
        if unknown:
            raise NewerError(f"passes[{i}] has {brief(sorted(unknown)[0])}, which this zokern does not know")
        if (one.get("keep_second") and rule.written < 2) or (one.get("square_of_sum") and "V" not in rule.coefs):
            raise ValueError(f"passes[{i}]: {rule.name} knows no such flag")
        if one.get("deferred") and (not folds or rule.name != "axpy"):
            raise ValueError(f"passes[{i}]: {rule.name} cannot wait, or the header lacks the feature 'fold'")
        if one.get("stochastic") and not one.get("rounded"):
            raise ValueError(f"passes[{i}]: stochastic without a seed to round with")
        numbers += rows * (len(rule.coefs) * len(seeds) + len(rule.scalars))
    if _integer(value.get("numbers"), "numbers", 0, MAX_NUMBERS) != numbers:
        raise ValueError(f"numbers is {value['numbers']}, and its passes have {numbers}")
    return numbers


def mark(value: Mapping[str, Any]) -> None:
    """Steps done, and the hash of the weights after them; where updates wait, also with these."""
    _integer(value.get("step"), "step", 0, MAX_STEP)
    _hash(value.get("hash"), "hash")
    if "folded" in value:
        _hash(value["folded"], "folded")


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is no whole number from {low} to {high}")
    return value


def _finite(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 3e38:
        raise ValueError(f"{name} is no finite number")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return value


def _hash(value: Any, name: str) -> None:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(f"{name} is no hash of 128 bits")

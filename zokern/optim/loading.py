"""Reads a state_dict: all of it is looked at before anything is changed, because it may come from anywhere.

What is wrong is named: the entry, what it is, and what it must be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zokern import _checks, parts
from zokern._checks import ZokernWarning
from zokern.optim import carried, saved_pending, state
from zokern.optim.parameters import RATES, check_group
from zokern.sweep import Counters

ENTRIES = (
    "method", "seed", "tensor_ids", "module", "names", "counters", "skipped", "options", "history",
)  # fmt: skip
NEVER_NEGATIVE = ("h", "v")  # curvatures and second moments
ANEW = (
    "load the model's weights alone and begin a new run (in the Trainer: from_pretrained(checkpoint), and no "
    "resume_from_checkpoint)"
)


@dataclass(frozen=True)
class Ours:
    """What the optimizer is, that loads."""

    method: str
    options: Mapping[str, Any]
    names: Sequence[Sequence[str]]
    has_module: bool
    groups: Sequence[Mapping[str, Any]]
    spec: state.Spec
    pipelined: bool
    every_step: bool  # each step moves every parameter
    completed: Callable[[Mapping[str, Any]], Mapping[str, Any]]  # options of an earlier version, with those of later


@dataclass(frozen=True)
class Saved:
    """What was saved, found good. states: copies, on their parameters' devices."""

    seed: int
    tensor_ids: list[list[int]]
    counters: Counters
    skipped: int
    flat: int
    history: list[Any]
    pending: saved_pending.SavedPending | None
    states: dict[Tensor, dict[str, Any]]


def read(given: Mapping[str, Any], ours: Ours) -> Saved:
    """
    Raises:
        TypeError, ValueError: naming what is wrong.
    """
    own = carried.entry(given)
    if own is None:
        raise ValueError(
            f"state_dict has no 'zokern' entry. Coming from another optimizer, {ANEW}; of zokern's, what it was passed "
            "through has dropped the entry: save state_dict() as it is"
        )
    _check(isinstance(own, Mapping), f"state_dict: 'zokern' is a {type(own).__name__}; it must be a dict")
    version = own.get("format")
    if isinstance(version, Tensor) or version not in (state.FORMAT, state.WITH_PENDING) or own.get("contract") != "zk1":
        raise ValueError(
            f"state_dict has format {own.get('format')!r} and noise contract {own.get('contract')!r}; this version reads "
            f"formats {state.FORMAT} and {state.WITH_PENDING} and contract 'zk1'"
        )
    missing = [name for name in ENTRIES if name not in own]
    _check(not missing, f"state_dict: 'zokern' has no {', '.join(map(repr, missing))}; load it whole, as it was saved")
    if own["method"] != ours.method:
        raise ValueError(f"state_dict is of {own['method']}, and this is {ours.method}; give that method, or {ANEW}")
    _check_options(own["options"], ours)
    ids = _tensor_ids(own["tensor_ids"], ours)
    _check_names(own, ours)
    _check_groups(given, ours)
    return Saved(
        _checks.check_seed(own["seed"], "state_dict: seed"),
        ids,
        _counters(own["counters"]),
        _checks.check_integer(own["skipped"], "state_dict: skipped", 0, _checks.MAX_SEED),
        _checks.check_integer(own.get("flat", 0), "state_dict: flat", 0, _checks.MAX_SEED),
        _listed(own["history"], "history"),
        _pending(own),
        _states(given, own, ours),
    )


def same(a: Any, b: Any) -> bool:
    """Plain values and tensors, nested, bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor) and isinstance(b, Tensor)
            and a.shape == b.shape and a.dtype == b.dtype
            and torch.equal(parts.local(a).to(b.device), parts.local(b))  # one rank alone may ask
        )  # fmt: skip
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def _check(good: object, message: str) -> None:
    if not good:
        raise ValueError(message)


def _pending(own: Mapping[str, Any]) -> saved_pending.SavedPending | None:
    found = saved_pending.read(own.get("pending"))
    _check(
        (found is None) == (own["format"] == state.FORMAT),
        "state_dict: 'format' and 'pending' do not fit; load it whole",
    )
    return found


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"state_dict: {name} is a {type(value).__name__}; it must be a list")
    return list(value)


def _check_options(options: Any, ours: Ours) -> None:
    _check(isinstance(options, Mapping), f"state_dict: options is a {type(options).__name__}; it must be a dict")
    saved = ours.completed(options)
    for name, value in ours.options.items():
        if not _equal(saved.get(name), value):
            raise ValueError(
                f"{name} is {_checks.brief(saved.get(name))} in state_dict and {value!r} here; make them agree, or {ANEW}"
            )


def _equal(saved: Any, value: Any) -> bool:
    """A tensor or an array is no setting; what cannot be compared with one is none either."""
    try:
        return not isinstance(saved, Tensor) and bool(saved == value)
    except Exception:
        return False


def _tensor_ids(given: Any, ours: Ours) -> list[list[int]]:
    ids = [_listed(group, f"tensor_ids[{g}]") for g, group in enumerate(_listed(given, "tensor_ids"))]
    shapes, wanted = list(map(len, ids)), list(map(len, ours.names))
    _check(
        shapes == wanted,
        f"state_dict has groups of {shapes} parameters, this optimizer of {wanted}: make it of the same. Where some were "
        "frozen during the run, make the optimizer first, and freeze then",
    )
    seen: dict[int, str] = {}
    for g, group in enumerate(ids):
        for i, one in enumerate(group):
            name = f"tensor_ids[{g}][{i}]"
            _checks.check_integer(one, f"state_dict: {name}", 0, _checks.MAX_TENSOR_ID)
            other = seen.setdefault(one, name)
            _check(other is name, f"state_dict: {name} is {one}, as {other}; two parameters would get the same noise")
    return ids


def _check_names(own: Mapping[str, Any], ours: Ours) -> None:
    _checks.check_flag(own["module"], "state_dict: module")
    names = [_listed(group, f"names[{g}]") for g, group in enumerate(_listed(own["names"], "names"))]
    _check(
        list(map(len, names)) == list(map(len, ours.names)), "state_dict: names has others than one for each parameter"
    )
    if own["module"] and ours.has_module:
        for theirs, mine in zip(chain(*names), chain(*ours.names), strict=True):
            same_name = isinstance(theirs, str) and state.unwrapped(theirs) == state.unwrapped(mine)
            _check(same_name, f"state_dict has parameter {theirs!r} where this module has {mine!r}")


def _check_groups(given: Mapping[str, Any], ours: Ours) -> None:
    _check("param_groups" in given, "state_dict has no 'param_groups'; load it whole, as it was saved")
    groups = _listed(given["param_groups"], "param_groups")
    _check(len(groups) == len(ours.groups), f"state_dict has {len(groups)} groups, this optimizer {len(ours.groups)}")
    numbers: set[int] = set()
    for g, (group, mine) in enumerate(zip(groups, ours.groups, strict=True)):
        where = f"param_groups[{g}]"
        _check(isinstance(group, Mapping), f"state_dict: {where} is a {type(group).__name__}; it must be a dict")
        missing = [name for name in ("params", *RATES) if name not in group]
        _check(not missing, f"state_dict: {where} has no {', '.join(map(repr, missing))}; load it whole")
        params = _listed(group["params"], f"{where}['params']")
        _check(len(params) == len(mine["params"]), f"state_dict: {where} has {len(params)} parameters")
        for number in params:
            if not isinstance(number, str):  # torch.distributed.checkpoint names parameters
                _checks.check_integer(number, f"state_dict: {where}['params']", 0)
        numbers.update(params)
        try:
            check_group({**group, "params": mine["params"]}, g)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state_dict: {error}") from None
        if ours.pipelined and isinstance(group["eps"], Tensor):
            raise TypeError(f"state_dict: eps of {where} is a tensor; pipelined=True needs a number")
    total = sum(len(mine["params"]) for mine in ours.groups)
    _check(len(numbers) == total, "state_dict: param_groups numbers two parameters alike")


def _counters(given: Any) -> Counters:
    _check(isinstance(given, Mapping), f"state_dict: counters is a {type(given).__name__}; it must be a dict")
    names = [one.name for one in fields(Counters)]
    for what, listed in (("lacks", set(names) - set(given)), ("has an unknown", set(given) - set(names))):
        _check(not listed, f"state_dict: counters {what} {', '.join(sorted(map(repr, listed)))}; load it whole")
    return Counters(**{
        name: _checks.check_integer(given[name], f"state_dict: counters[{name!r}]", 0, _checks.MAX_SEED) for name in names
    })  # fmt: skip


def _states(given: Mapping[str, Any], own: Mapping[str, Any], ours: Ours) -> dict[Tensor, dict[str, Any]]:
    _check("state" in given, "state_dict has no 'state'; load it whole, as it was saved")
    every = given["state"]
    _check(isinstance(every, Mapping), f"state_dict: state is a {type(every).__name__}; it must be a dict")
    numbers = list(chain(*(group["params"] for group in given["param_groups"])))
    known = set(numbers)
    strange = [number for number in every if number not in known]
    _check(not strange, f"state_dict: state has {strange[:4]}, which param_groups does not have")
    params, names = chain(*(group["params"] for group in ours.groups)), chain(*ours.names)
    had: list[Any] = [None] * len(numbers)  # an earlier version did not say
    if "states" in own:
        had = [
            one for g, group in enumerate(_listed(own["states"], "states")) for one in _listed(group, f"states[{g}]")
        ]
        _check(len(had) == len(numbers), "state_dict: states has others than one entry for each parameter")
    kept: dict[Tensor, dict[str, Any]] = {}
    without: list[str] = []
    for number, p, name, was in zip(numbers, params, names, had, strict=True):
        values = every.get(number, {})
        _check(isinstance(values, Mapping), f"state_dict: state of {name} is a {type(values).__name__}")
        if was is False and all(isinstance(one, Mapping) and not one for one in values.values()):
            values = {}  # torch.distributed.checkpoint puts empty ones where a flattened state_dict has no states
        missing = [one for one in ours.spec if one not in values]
        if missing and (was or len(missing) < len(ours.spec)):
            raise ValueError(f"state_dict: {', '.join(missing)} of {name} is missing; load it whole, as it was saved")
        if missing and was is None and p.requires_grad and p.numel():
            without.append(name)
        for one, value in values.items():
            if one in ours.spec:
                _check_state(value, one, name, p, ours.spec[one][0])
        if values:
            kept[p] = {
                one: _like(p, value, name) if isinstance(value, Tensor) else value for one, value in values.items()
            }
    if kept and without and ours.every_step:
        warnings.warn(
            f"state_dict has no states for {', '.join(without[:4])}{' ...' if len(without) > 4 else ''}, which begin anew; "
            "that is right if they were frozen until now",
            ZokernWarning,
            stacklevel=5,
        )
    return kept


def _everywhere(good: Any) -> bool:
    """Of shards on all ranks, which ask together, so that all raise or none; bool() of a DTensor is of a rank's own."""
    every = good.all()
    return bool(every.full_tensor() if parts.is_dtensor(every) else every)


def _like(p: Tensor, value: Any, name: str) -> Tensor:
    """A copy that lies as the parameter does: a DTensor's has its shards."""
    made: Tensor
    if not parts.is_dtensor(p):
        whole: Tensor = value.full_tensor() if parts.is_dtensor(value) else value
        return whole.to(p.device, copy=True)
    if parts.is_dtensor(value):
        made = value.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
        return made.to(p.device, copy=True)
    made = state.full_like(p, 0.0, value.dtype)
    if parts.local(made).numel():
        parts.local(made).copy_(value[tuple(slice(first, first + n) for first, n in parts.spans(p, name))])
    return made


def _check_state(value: Any, what: str, name: str, p: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"state_dict: {what} of {name} is a {type(value).__name__}; it must be a tensor")
    if value.shape != p.shape or value.dtype != dtype:
        raise ValueError(
            f"state_dict: {what} of {name} is {tuple(value.shape)} {value.dtype}; this optimizer's is {tuple(p.shape)} "
            f"{dtype}"
        )
    if value.layout != torch.strided or value.device.type == "meta":
        raise ValueError(
            f"state_dict: {what} of {name} is {_checks.describe(value)}; it must be a dense tensor with storage"
        )
    _check(
        _everywhere(torch.isfinite(value)),
        f"state_dict: {what} of {name} has values that are not finite: the run had diverged; take an earlier one",
    )
    if what in NEVER_NEGATIVE:
        _check(_everywhere(value >= 0), f"state_dict: {what} of {name} has values below 0, which no run leaves")

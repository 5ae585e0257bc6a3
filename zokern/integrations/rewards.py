"""Reward functions in TRL's form: `reward(prompts, completions, **columns) -> a number for each, or None`.

The reward of a batch of n completions is a mean for each function, and all of them are weighed and added:

    R_k = (1/n) sum_i r_ki        None, a function that does not apply to a row, counts 0
    R = sum_k w_k R_k
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zokern._checks import check_number
from zokern.integrations.notes import Notes

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # as in TRL
ARGUMENTS = ("prompts", "completions", "trainer_state", "log_metric", "log_extra")  # what else functions get
Reward = Callable[..., Sequence[float | None]]


class Rewards:
    """Functions by name, and their weights.

    functions: one, a list of them, whose names are those of their definitions, or a dict by name. weights: a list in their
    order, or a dict by name; those that are not listed weigh 1. notes: takes what the user should know.

    Raises:
        TypeError, ValueError: naming the function or the weight.
    """

    def __init__(
        self,
        functions: Reward | Sequence[Reward] | Mapping[str, Reward],
        weights: Sequence[float] | Mapping[str, float] | None = None,
        notes: Notes | None = None,
    ) -> None:
        self.notes = notes or Notes()
        self.functions = _named(functions)
        for name, function in self.functions.items():
            _check(name, function)
        self.weights = self._weighed(weights)

    def _weighed(self, weights: Any) -> dict[str, float]:
        if weights is None:
            return {}
        if not isinstance(weights, Mapping):
            if isinstance(weights, str) or not isinstance(weights, Sequence):
                raise TypeError(f"reward_weights must be a list or a dict by name, got {type(weights).__name__}")
            if len(weights) != len(self.functions):
                raise ValueError(f"reward_weights has {len(weights)} numbers, and reward_funcs {len(self.functions)}")
            weights = dict(zip(self.functions, weights, strict=True))
        unknown = [name for name in weights if name not in self.functions]
        if unknown:
            raise ValueError(
                f"reward_weights has {', '.join(map(repr, unknown))}, and reward_funcs "
                f"{', '.join(map(repr, self.functions))}"
            )
        return {name: check_number(weight, f"reward_weights[{name!r}]") for name, weight in weights.items()}

    def each(self, prompts: list[Any], completions: list[Any], **columns: Any) -> dict[str, list[float]]:
        """r_ki by name, with 0 for None.

        Raises:
            TypeError, ValueError: naming the function, for what is not one number or None for each completion.
        """
        rows = {name: self._of(name, prompts, completions, columns) for name in self.functions}
        nothing = [i for i in range(len(prompts)) if all(row[i] is None for row in rows.values())]
        if nothing:
            self.notes.add(
                "nothing",
                f"no reward function applies to the prompt {prompts[nothing[0]]!r}: all returned None, which counts 0. "
                "Further ones are not told",
            )
        return {name: [0.0 if r is None else r for r in row] for name, row in rows.items()}

    def _of(self, name: str, prompts: list[Any], completions: list[Any], columns: Any) -> list[float | None]:
        given = self.functions[name](prompts=prompts, completions=completions, **columns)
        try:
            each = list(given)
        except TypeError as error:
            raise TypeError(
                f"reward function {name!r} returned a {type(given).__name__}; a list with a number for each completion is "
                "needed"
            ) from error
        if len(each) != len(prompts):
            raise ValueError(f"reward function {name!r} returned {len(each)} rewards for {len(prompts)} completions")
        numbers: list[float | None] = []
        for i, one in enumerate(each):
            try:
                if isinstance(one, str):
                    raise TypeError
                number = None if one is None else float(one)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"reward function {name!r} returned a {type(one).__name__} for completion {i}; a number or None is "
                    "needed"
                ) from error
            if number is not None and math.isnan(number):
                raise ValueError(
                    f"reward function {name!r} returned nan for completion {i}; return None where it does not apply"
                )
            numbers.append(number)
        return numbers


def means(each: Mapping[str, list[float]]) -> dict[str, float]:
    """R_k of r_ki, by name."""
    return {name: sum(row) / len(row) for name, row in each.items()}


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Of a batch, what reward functions get beside prompts and completions.

    Raises:
        ValueError: for a column that has the name of something else that they get, or that some rows lack.
    """
    named = [name for name in rows[0] if name not in NOT_COLUMNS]
    for name in named:
        if name in ARGUMENTS:
            raise ValueError(
                f"the dataset has a column {name!r}, and reward functions get another thing by that name; rename it"
            )
        if any(name not in row for row in rows):
            raise ValueError(
                f"some rows of the dataset have a column {name!r} and others have not; give it to all of them"
            )
    return {name: [row[name] for row in rows] for name in named}


def no_table(column: str, values: Sequence[Any]) -> None:
    """TRL's log_extra adds to its table of completions, of which there is none here."""


def _named(functions: Any) -> dict[str, Reward]:
    if isinstance(functions, Mapping):
        named = dict(functions)
    else:
        listed = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        names = [getattr(one, "__name__", type(one).__name__) for one in listed]
        double = [name for name in names if names.count(name) > 1]
        if double:
            raise ValueError(f"reward_funcs has two functions called {double[0]!r}; give a dict by name")
        named = dict(zip(names, listed, strict=True))
    if not named:
        raise ValueError("reward_funcs is empty: there is nothing to climb")
    return named


def _check(name: str, function: Any) -> None:
    if isinstance(function, str) or hasattr(function, "forward") or not callable(function):
        raise TypeError(
            f"reward_funcs: {name!r} is a {type(function).__name__}; give a function "
            "reward(prompts, completions, **columns), which may call a model inside"
        )
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise TypeError(
            f"reward_funcs: {name!r} is async, and a step waits for its rewards anyway; give a plain function"
        )

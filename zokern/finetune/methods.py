"""The methods that `zokern finetune --method` knows: one entry each, a class and the settings it takes.

Adding a method is adding an entry here; its own settings become fields of Options and options of the command. A field that
is None was not given: the class has the default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from zokern.finetune.options import Options

COMMON = ("lr", "eps", "weight_decay", "distribution", "seed", "rounding", "placement", "pipelined", "backend")
SAMPLES, CURVATURE = ("num_samples",), ("smoothing", "curvature_dtype")


class Method(NamedTuple):
    """A class of zokern; `takes`: its own settings; `forwards`: closure calls a step, from its settings; `lr`: the default
    for encoders of some ten million parameters."""

    cls: str
    takes: tuple[str, ...]
    forwards: Callable[[dict[str, Any]], int]
    lr: float
    maximises: bool = False  # a reward: the closure's loss with its sign changed


_MEZO = Method(
    "MeZO",
    (*SAMPLES, "one_sided", "update", "beta1", "beta2", "delta", "horizon"),
    lambda s: s["num_samples"] + 1 if s["one_sided"] else 2 * s["num_samples"],
    5e-5,
)
METHODS: dict[str, Method] = {
    "mezo": _MEZO,
    "lezo": _MEZO._replace(lr=2e-4),
    "hizoo": Method("HiZOO", (*SAMPLES, *CURVATURE), lambda s: 2 * s["num_samples"] + 1, 5e-5),
    "helene": Method(
        "HELENE",
        (*SAMPLES, "beta1", "beta2", "anneal_steps", "hessian_interval", "gamma", "floor", "delta"),
        lambda s: 2 * s["num_samples"],
        5e-6,
    ),
    "mezo-gv": Method(
        "MeZOGV",
        ("candidates", "elite", *CURVATURE),
        lambda s: s["candidates"] + 2 + (s["smoothing"] is not None),
        1e-4,
    ),
    "mezo-greedy": Method(
        "MeZOGreedy", ("candidates", *CURVATURE), lambda s: s["candidates"] + 1 + (s["smoothing"] is not None), 5e-5
    ),
    "fzoo": Method("FZOO", ("candidates",), lambda s: s["candidates"] + 1, 5e-6),
    "es": Method(
        "ES",
        ("num_directions", "shaping", "antithetic"),
        lambda s: s["num_directions"] * (1 + s["antithetic"]),
        5e-6,
        maximises=True,
    ),
}
# The settings that belong to some methods only, in the order of the command's options.
OWN = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.takes))
LR_OF_UPDATE = {"momentum": 5e-6, "adam": 5e-4, "adamezo": 1e-4, "sign": 3e-4}  # of mezo and lezo, where it is not sgd


def settings(options: Options) -> dict[str, Any]:
    """Every setting of the optimizer, with the class's own default where none was given."""
    import zokern

    method = METHODS[options.method]
    parameters = inspect.signature(getattr(zokern, method.cls).__init__).parameters
    values = {name: getattr(options, name) for name in (*COMMON, *method.takes)}
    if "beta1" in values:  # one argument, two options
        given = values.pop("beta1"), values.pop("beta2")
        defaults = parameters["betas"].default
        values["betas"] = tuple(
            default if beta is None else beta for beta, default in zip(given, defaults, strict=True)
        )
    values = {name: parameters[name].default if value is None else value for name, value in values.items()}
    if options.lr is None:
        values["lr"] = LR_OF_UPDATE.get(values.get("update", ""), method.lr)
    if isinstance(values.get("curvature_dtype"), str):
        import torch

        values["curvature_dtype"] = getattr(torch, values["curvature_dtype"])
    return values


def forwards(options: Options) -> int:
    """Forwards a step, one for each batch that is accumulated."""
    return METHODS[options.method].forwards(settings(options)) * options.accumulate


def build(model: nn.Module, options: Options) -> Any:
    """The optimizer of `options.method` over the trainable parameters of `model`."""
    import zokern

    values = settings(options)
    dropped = options.num_dropped
    if dropped is None and options.method == "lezo":
        dropped = len(zokern.layers.find_blocks(model)) * 3 // 4
    if dropped is not None:
        values["layers"] = zokern.RandomBlocks(dropped)
    return getattr(zokern, METHODS[options.method].cls)(model, **values)

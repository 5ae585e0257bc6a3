"""Parameters for linear layers whose weight cannot be written: zeros without memory, whose updates stay terms of low rank.

    y = layer(x) + x delta^T,    delta [out, in]

A quantised weight is codes and scales, and an update of low rank added to it could not be stored there. With
placement="forward" and fold_every=0 it need not be: it stays two thin products beside the layer, as an adapter does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zokern import _checks

NAME = "delta"


class Delta(nn.Parameter):
    """Zeros [out, in] of which one is in memory. It is never written: what is to be added to it waits (fold_every=0)."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Delta:
        if id(self) not in memo:
            memo[id(self)] = made(self.shape[0], self.shape[1], self.device, self.requires_grad)
        found: Delta = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return made, (*self.shape, self.device, self.requires_grad)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Delta({self.shape[0]}, {self.shape[1]})"


def made(rows: int, columns: int, device: torch.device, requires_grad: bool = True) -> Delta:
    zeros = torch.zeros((), dtype=torch.float32, device=device).expand(rows, columns)
    one: Delta = torch.Tensor._make_subclass(Delta, zeros, requires_grad)
    return one


def is_nothing(base: Tensor) -> bool:
    """Whether a matrix is zeros of a Delta, so that a product with it need not be made."""
    return base.stride(0) == 0


class _Layer:
    """The hooks of one module. A copy of the module has its own."""

    def __init__(self) -> None:
        self.key = ""  # of the delta in the state_dict that is being loaded

    def add(self, module: nn.Module, args: Sequence[Any], named: Mapping[str, Any], out: Any) -> Any:
        shown: Any = module._parameters[NAME]
        if type(shown) is Delta:
            return out  # nothing is to be added
        x = args[0] if args else next(iter(named.values()))
        return out + functional.linear(x, shown).to(out.dtype)

    def loads(self, module: nn.Module, saved: Any, prefix: str, *others: Any) -> None:
        self.key = prefix + NAME

    def loaded(self, module: nn.Module, result: Any) -> None:
        if self.key in result.missing_keys:
            result.missing_keys.remove(self.key)


class _LeaveOut:
    """A hook of a class of its own, as torch marks this kind."""

    def __call__(self, module: nn.Module, saved: dict[str, Any], prefix: str, metadata: Any) -> None:
        saved.pop(prefix + NAME, None)


def add_deltas(model: nn.Module, modules: Iterable[str] | None = None) -> list[str]:
    """Gives linear layers that cannot be written a parameter `delta` [out, in], for a fine-tune that is never folded:

        model.requires_grad_(False)
        zokern.add_deltas(model)
        opt = zokern.MeZO(model, lr, eps=eps, distribution=zokern.LowRank(1), placement="forward", fold_every=0)
        ...                                                       # steps
        zokern.integrations.peft.save_adapter(opt, "adapter")

    The layers are only read. Each gets a forward hook, which adds x delta^T to what it makes while a step's closure runs or
    inside `opt.folded()`. A delta is float32 zeros in shape alone: it takes no memory, and is left out of state_dicts.

    Args:
        model: any module, quantised already: by torchao's int8, int4 and float8, by bitsandbytes' 8 and 4 bits, or with
            weights in one byte. Other parameters stay as they are, and are trained if they ask for it.
        modules: names of linear layers, of any type with `in_features` and `out_features`. Default: all that have a
            quantised weight.

    Returns:
        The names of the layers with a delta, in the model's order.

    Raises:
        TypeError: for a model that is no nn.Module, or modules that are one string.
        ValueError: where there is no such layer, or a name is of none. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if modules is None:
        found = [name for name, one in model.named_modules() if _sides(one) is not None and _is_read_only(one)]
        if not found:
            raise ValueError(
                f"model: {type(model).__name__} has no linear layer with a quantised weight; train its weights as they "
                "are, or name the layers in modules="
            )
    else:
        if isinstance(modules, str):
            raise TypeError(f"modules must be a list of names, got {modules!r}; give [{modules!r}]")
        found = _named(model, list(modules))
    for name in found:
        _add(model.get_submodule(name), name)
    return found


def _meant(name: str, every: Mapping[str, nn.Module]) -> str:
    """The whole names that end so, as a remedy."""
    ends = [other for other in every if other.endswith(f".{name}")]
    return (
        f"; give whole names, as in named_modules(): {', '.join(ends[:3])}{', ...' * (len(ends) > 3)}" if ends else ""
    )


def _named(model: nn.Module, wanted: list[str]) -> list[str]:
    every = dict(model.named_modules())
    for name in wanted:
        if name not in every:
            raise ValueError(f"modules: {type(model).__name__} has no module {name!r}{_meant(name, every)}")
        if _sides(every[name]) is None:
            raise ValueError(
                f"modules: {name!r} is a {type(every[name]).__name__}, without in_features and out_features: deltas are "
                "for linear layers"
            )
    if not wanted:
        raise ValueError("modules is empty: there is nothing to train")
    return [name for name in every if name in set(wanted)]


def _add(module: Any, name: str) -> None:
    if isinstance(module._parameters.get(NAME), Delta):
        return
    if hasattr(module, NAME):
        raise ValueError(f"{name} has a {NAME} of its own, so it cannot get one of zokern's; leave it out of modules=")
    held = next((t for t in (*module.parameters(), *module.buffers())), None)
    sides = _sides(module)
    assert sides is not None
    module.register_parameter(NAME, made(*sides, torch.device("cpu") if held is None else held.device))
    hooks = _Layer()
    module.register_forward_hook(hooks.add, with_kwargs=True)
    module.register_state_dict_post_hook(_LeaveOut())
    module.register_load_state_dict_pre_hook(hooks.loads)
    module.register_load_state_dict_post_hook(hooks.loaded)


def _sides(module: Any) -> tuple[int, int] | None:
    """[out, in] of a linear layer."""
    sides = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return sides if all(type(side) is int for side in sides) else None  # type: ignore[return-value]


def _is_read_only(module: nn.Module) -> bool:
    return any(_checks.is_quantised(p) for p in module.parameters(recurse=False))


# ------------------------------------------------------------------------------------------- what an optimizer does there


def check(p: Tensor, name: str, fold_every: int | None, rank: int) -> None:
    """
    Raises:
        ValueError: for a delta in an optimizer that would have to write it.
    """
    if not isinstance(p, Delta):
        return
    if fold_every != 0:
        raise ValueError(
            f"{name} has no memory that updates could be added to; give distribution=zokern.LowRank(1), "
            "placement='forward' and fold_every=0, with which they stay beside the layer"
        )
    if min(p.shape) <= rank:
        raise ValueError(
            f"{name} is {tuple(p.shape)}, and a matrix whose smaller side is not above the rank, {rank}, takes dense "
            "noise, for which it has no memory: take a lower rank, or freeze it with requires_grad_(False)"
        )


def refuse_fold(members: Iterable[Any]) -> None:
    """
    Raises:
        RuntimeError: naming a member that updates cannot be added to.
    """
    for m in members:
        if isinstance(m.param, Delta):
            raise RuntimeError(
                f"{m.name} has no memory that updates could be added to: they wait until "
                "zokern.integrations.peft.save_adapter(optimizer, directory) saves them"
            )


def refuse_sum(p: Tensor, name: str) -> None:
    """
    Raises:
        RuntimeError: where something else than a product asks for a delta's values.
    """
    if isinstance(p, Delta):
        raise RuntimeError(
            f"something else than a product asked for the values of {name}, which is shown as thin products alone: call "
            "the layer, or leave it out of zokern.add_deltas(model, modules)"
        )

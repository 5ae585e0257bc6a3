"""Why a tensor may have no effect: likely faults, and what is normal.

A perturbation that changes no bit of the loss has one of two reasons. The forward reads the weight, and its value does not
matter: softmax cancels a bias of attention keys, a ReLU is dead, the other matrix of a LoRA pair is 0. Or the forward does
not read it. Then either nobody asked for it (an expert without tokens, a pooler), which shows in that its module was not
called while others around it were; or something else was read in its place, which is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zokern.checking import adapters
from zokern.checking.subject import Tried

READ = "read, without effect: normal for key biases, dead units, the other matrix of a LoRA pair that is 0"
COARSE = "read, without effect: the loss has 16 bits, which show no change this small"
NOT_CALLED = (
    "its module was not called: normal for experts without tokens, poolers and heads that the loss does not use "
    "(freeze what is not meant to be trained)"
)
NOT_NEEDED = "its module ran and did not read it: normal for mask tokens and embeddings that this batch does not use"
COMPILED = (
    "it has an effect without torch.compile, and none with it: the compiled code keeps a copy of its own (freezing=True); "
    "compile without freezing"
)
COPY = (
    "no module of the model was called: the closure runs a copy (deepcopy, AveragedModel, an exported, frozen, traced or "
    "quantised one), or another model"
)
OTHER = (
    "its module ran without reading it: it uses another tensor in its place (functional_call with older tensors, a packed "
    "or quantised copy, a cached value)"
)
CACHED = "its parametrization was not computed: a value from before is used (parametrize.cached() around the step)"
ENGINE = (
    "a module above it ran, and none inside that: a frozen, traced or packed copy runs in their place, with weights of its "
    "own"
)
UNSEEN = "nothing read it: the closure uses a copy of it, or a value computed before"
SHOWN = (
    "in place it has an effect, as {placement!r} shows it none: the closure reads the weights themselves, not what the "
    "module holds (a traced or exported model, functional_call, a tensor taken out before); use placement='inplace'"
)
BAKED = (
    "operations outside the model's modules ran without reading it: a frozen or exported copy has it as a constant, or "
    "merged it with an equal one (jit.freeze, optimize_for_inference)"
)


@dataclass(frozen=True)
class Watched:
    """Of one evaluation without compiled code: ids of the tensors that were read, of the modules that were called. reads
    is None where it could not be watched."""

    reads: set[int] | None
    calls: set[int]


def explain(one: Tried, module: nn.Module | None, watched: Watched) -> tuple[bool, str]:
    """(suspicious, why) for a tensor without effect, which compiled code and placement are not the reason of."""
    adapter = adapters.idle(one.names, module)
    if adapter:
        return True, adapter
    if watched.reads is None:
        return True, UNSEEN
    if id(one.tensor) in watched.reads:
        return False, READ
    if module is None or not one.owners:
        return True, UNSEEN
    if not watched.calls:
        others = any(id(p) in watched.reads for p in module.parameters())
        return True, BAKED if others else COPY
    judged = [_unread(one, path, owner, module, watched) for path, owner in one.owners]
    return next((found for found in judged if found[0]), judged[0])


def _unread(one: Tried, path: str, owner: nn.Module, module: nn.Module, watched: Watched) -> tuple[bool, str]:
    reads, calls = watched.reads or set(), watched.calls
    name = next(name for name, p in owner._parameters.items() if p is one.tensor)
    if type(owner).__name__ == "ParametrizationList" and id(owner) not in calls:
        return True, CACHED
    if id(owner) in calls:
        leaf = not any(True for _ in owner.children())
        any_read = any(id(p) in reads for p in owner.parameters())
        if not any_read or (leaf and name.startswith("weight")):
            return True, OTHER
        return False, NOT_NEEDED
    above = _nearest_called(path, module, calls)
    if above is not None and not any(id(child) in calls for child in above.modules() if child is not above):
        return True, ENGINE
    return False, NOT_CALLED


def _nearest_called(path: str, module: nn.Module, calls: set[int]) -> nn.Module | None:
    """The innermost module around `path` that was called."""
    while path:
        path = path.rpartition(".")[0]
        found = module.get_submodule(path) if path else module
        if id(found) in calls:
            return found
    return None

"""The sentences of guards: why a step would train nothing, why losses do not react, and what to do."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from zokern import deltas, parts
from zokern._checks import is_quantised

_announced: set[str] = set()
BACKWARD = (
    "the closure runs backward, or returns a loss with a graph: zokern needs losses alone, and each step pays for "
    "gradients that nobody uses. Leave out backward() and enable_grad()"
)
DRAWS = (
    "the closure draws from torch's random numbers, as a batch that is drawn in it does, or a dropout that is no module of "
    "torch's: the forwards of a step compare what each of them drew. Draw the batch outside the closure; and have dropout "
    "paired, by paired_randomness=True, or left out, by model.eval(). paired_randomness=False says that it is meant so"
)
AUTOMATIC = (
    "this is the closure of Lightning's automatic optimization, which runs a backward pass in every forward of the step, "
    "and of an accumulation shows the last batch alone. Make the module of zokern.integrations.lightning.ForwardOnly, as "
    "class Tuner(ForwardOnly, LightningModule), with training_step as it is (an optimizer_step of your own ends in "
    "super().optimizer_step); or set self.automatic_optimization = False and call "
    "self.optimizers().optimizer.step(closure, batches) by hand"
)
LEAVE_OUT = (
    "the closure calls backward(), and a step of zokern runs it without gradients: leave out backward() and zero_grad(), "
    "and return the loss"
)
NO_CLOSURE = (
    "step needs a closure that returns the loss, for example opt.step(lambda: model(x, y).loss). A loop that calls "
    "loss.backward() and then step() does first-order work; in place of transformers' Trainer, take "
    "zokern.integrations.transformers.ZOTrainer, or its ForwardOnly for other trainers; with accelerate, take "
    "zokern.integrations.accelerate.prepare(accelerator, opt) and call opt.step(closure, batch) in place of "
    "accelerator.backward(loss); in Lightning, make the module of zokern.integrations.lightning.ForwardOnly, or set "
    "self.automatic_optimization = False and call self.optimizers().step(closure)"
)


def lost_batches(steps: int) -> str:
    """Of a step under accelerate's accumulate(), with a closure and no batches."""
    return (
        f"accelerate accumulates over {steps} micro-batches, and its wrapper gives zokern the last closure of them alone: "
        f"unless that goes over all {steps} itself, the others are never used. Take opt = "
        "zokern.integrations.accelerate.prepare(accelerator, opt), and call opt.step(closure, batch) for each micro-batch"
    )


def half(dtype: torch.dtype) -> str:
    """Of losses that arrive in 16 bits."""
    name = str(dtype).removeprefix("torch.")
    step = torch.finfo(dtype).eps
    return (
        f"the closure returns its loss in {name}, whose neighbouring numbers at 1 are {step:g} apart: most differences "
        "between two probes are rounded away. Take the loss of float32 outputs, for example "
        "cross_entropy(logits.float(), labels), or run the forward under autocast; loss.float() comes too late. With a "
        "Trainer: compute_loss_func= with such a loss, or bf16=True"
    )


def refuse_idle(owner: Any) -> NoReturn:
    """Of a step without an active parameter."""
    params = [p for group in owner.param_groups for p in group["params"]]
    trainable = [p for p in params if p.requires_grad and p.numel()]
    if trainable and owner.layers is not None:
        raise RuntimeError(
            f"this step would train nothing: all {len(trainable)} trainable parameters lie in blocks that layers leaves "
            f"out ({owner.layers.num_dropped} of {len(owner.layers.names)}); leave out fewer, or train something outside "
            "the blocks"
        )
    why = f"none of its {len(params)} parameters has requires_grad=True" if params else "it has no parameters"
    found = adapters(owner.module)
    remedy = (
        "make trainable what is to be trained, or make the optimizer anew. get_peft_model, set_adapter and "
        "merge_and_unload freeze or replace what an optimizer was given before them"
    )
    raise RuntimeError(f"this step would train nothing: {why}{f'; {found}' if found else ''}; {remedy}")


def adapters(module: nn.Module | None) -> str:
    """What peft's layers in a module say of themselves, by their attributes: merged, or switched off."""
    for name, child in module.named_modules() if module is not None else ():
        if getattr(child, "merged_adapters", None):
            return f"the adapter of {name} is merged into the weights (unmerge_adapter() takes it out)"
        if hasattr(child, "merged_adapters") and getattr(child, "disable_adapters", False) is True:
            return f"the adapter of {name} is disabled (enable_adapter_layers() switches it on)"
    return ""


def flat(owner: Any, count: int, loss_dtype: torch.dtype | None, whole: bool) -> str:
    """Of several flat steps in a row, with the causes that are seen first. Reads weights: it is said once."""
    causes: list[str] = []
    if whole:
        causes.append(
            "the loss is a step function (its values are whole numbers, as of a count or an accuracy): small changes of "
            "the weights do not move it; use a smooth loss, or ES with a larger eps"
        )
    found = adapters(owner.module)
    if found:
        causes.append(found)
    if loss_dtype is not None:
        causes.append(
            f"the loss arrives in {str(loss_dtype).removeprefix('torch.')}, which rounds small differences away; take it "
            "of float32 outputs"
        )
    spacing = _spacing(owner)
    if spacing:
        causes.append(spacing)
    if owner.module is not None and _compiled(owner.module):
        causes.append("the module is compiled, and a compiler that freezes weights keeps copies that no step reaches")
    place = owner._placement.name
    if place in ("shadow", "stream"):
        causes.append(
            "the closure runs a copy, a trace, an export or a functional_call of the module, which does not see the "
            f"perturbed copies that placement={place!r} shows to the module; run the module itself, or take "
            "placement='inplace' where the other one shares its memory"
        )
    else:
        causes.append("the closure runs a copy or an engine with weights of its own; run what the optimizer was given")
    causes.append(
        "the loss does not depend on the trained parameters (computed outside the closure, or from frozen parts)"
    )
    listed = "; ".join(f"({i}) {cause}" for i, cause in enumerate(causes, 1))
    return (
        f"the losses of {count} steps were equal to the last bit, five or more of them in a row: the loss does not react "
        f"to the perturbation, so nothing is learnt (weight decay goes on). Likely causes: {listed}. Further ones are "
        "only counted: see flat_steps"
    )


def _compiled(module: nn.Module) -> bool:
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in module.modules()
    )


def _spacing(owner: Any) -> str:
    """The first 16-bit weight whose neighbours are further apart than eps moves it."""
    for g, group in enumerate(owner.param_groups):
        for p in group["params"]:
            if p.requires_grad and p.element_size() == 2 and p.numel():
                rms = float(parts.local(p).detach().float().square().mean().sqrt())
                apart = rms * torch.finfo(p.dtype).eps
                eps = float(group["eps"])
                if math.isfinite(apart) and eps < apart / 2:
                    name = owner._parameters.registry.names[id(p)]
                    return (
                        f"eps {eps:g}{f' of group {g}' if g else ''} is below the spacing of {name}'s "
                        f"{str(p.dtype).removeprefix('torch.')} numbers, about {apart:.1g}; take a larger eps, or "
                        "float32 weights"
                    )
    return ""


def announce_quantised(module: nn.Module, say: Callable[[str], object] | None = None) -> None:
    """Says what of a module with quantised parameters is left out; once, unless it is told how to say it."""
    told = quantised(module)
    if told and say is not None:
        say(told)
    elif told and told not in _announced:
        print(f"zokern: {told}", file=sys.stderr)
    if told:
        _announced.add(told)


def quantised(module: nn.Module) -> str:
    """How much of a module is trained that has quantised parameters; "" where it has none."""
    every = list(module.named_parameters())
    beside = {name.removesuffix(deltas.NAME) for name, p in every if isinstance(p, deltas.Delta)}  # trained by these
    left_out = [
        name for name, p in every
        if not p.requires_grad and is_quantised(p) and name[: name.rfind(".") + 1] not in beside
    ]  # fmt: skip
    if not left_out:
        return ""
    floating = [p for _, p in every if p.is_floating_point() and not is_quantised(p)]
    trained = sum(p.numel() for p in floating if p.requires_grad)
    return (
        f"{trained:,} of the {sum(p.numel() for p in floating):,} floating-point numbers of {type(module).__name__} are "
        f"trained; {len(left_out)} quantised tensors are left out "
        f"({', '.join(left_out[:2])}{', ...' if len(left_out) > 2 else ''}): zokern.scales(model) has their scales, and "
        "zokern.add_deltas(model) trains beside them"
    )


def is_of_backward(error: RuntimeError) -> bool:
    """Whether a closure's error is what its backward() ends with in a step."""
    return "does not require grad" in str(error) or "modified by an inplace operation" in str(error)

"""The floating-point scales of a quantised model's weights, to train them and leave the codes alone.

A quantised weight is codes times scales, W = s * q. QZO (arXiv 2505.13430) perturbs s, which is small and has a dtype that
a pass can write, and never touches q. `scales` finds them in torchao's tensors and bitsandbytes' parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from zokern import _checks

Named = tuple[str, Tensor]
# Of bitsandbytes' 4-bit layers: on CPUs with AVX512-BF16 a forward writes the weights anew in another order, and a later
# state_dict() leaves their scales in it (0.50.2; findings/bitsandbytes_state_dict_disorders_4bit_scales.sh).
PACKS = "support_avx512bf16_for_cpu"


def keep_codes(model: nn.Module) -> None:
    """Lets bitsandbytes' 4-bit weights stay as they were loaded, on a CPU too, so that saving a checkpoint, or an adapter
    on top, changes nothing, and a replay, which has no forward, ends with the same weights. Before the first forward."""
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)


def scales(model: nn.Module) -> list[Named]:
    """The scales of the quantised weights of `model`, as `zokern.MeZO(zokern.scales(model), lr=..., eps=...)` takes them.

    Args:
        model: any module; tied weights count once. It is not changed: what is returned shares memory with the scales that
            its forwards read, so that a step on it is a step of the model.

    Returns:
        (name, tensor) pairs in the order of the modules, each tensor float32, bfloat16 or float16 with requires_grad. The
        name is the parameter's and the scale's: "0.weight.scale" (torchao), "0.weight.SCB" (bitsandbytes, 8 bits: the
        largest absolute value of each row, [rows]), "0.weight.absmax" (4 bits: of each block).

    The list is of the model as it is now. Moving the model, quantising it again or, with bitsandbytes' 4 bits on a CPU,
    its state_dict() makes other scales: call `scales` again, and make the optimizer anew. There is no module that shows
    copies of scales, so the placement is inplace.

    Raises:
        TypeError: for a model that is no nn.Module.
        ValueError: naming the parameter, for scales that no pass can write in place (doubly quantised, 8 bits wide, with
            zero points in one tensor), or that the next forward will replace; for a model without quantised weights.

    Source: QZO, arXiv 2505.13430, section 3: the scales are perturbed, and the directional derivative is clipped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found: list[Named] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                found += [(f"{name}.{part}", _alias(t)) for part, t in _of(module, name, p)]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no quantised weights of torchao or bitsandbytes with scales; train its "
            "parameters as they are, zokern.MeZO(model)"
        )
    return found


def _alias(scale: Tensor) -> Tensor:
    """The same memory as a leaf of its own: the model's tensor keeps its requires_grad."""
    return scale.detach().requires_grad_()


def _of(module: nn.Module, name: str, p: Tensor) -> Iterator[Named]:
    """The scales of one parameter; none for one that is not quantised."""
    kind = type(p).__name__
    if kind == "Int8Params":
        yield from _eight_bits(module, name, p)
    elif kind == "Params4bit":
        yield from _four_bits(module, name, p)
    elif _checks.is_composed(p):
        yield from _wrapped(name, p)


def _eight_bits(module: nn.Module, name: str, p: Any) -> Iterator[Named]:
    """bitsandbytes' Int8Params: the first forward moves its scales to the layer's state."""
    scale = getattr(p, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    if scale is not None:
        yield "SCB", _checked(f"{name}.SCB", scale)
    elif not p.is_floating_point():
        raise ValueError(
            f"{name}: an Int8Params without its scales (SCB); quantise it again by moving the model to a device"
        )


def _four_bits(module: Any, name: str, p: Any) -> Iterator[Named]:
    """bitsandbytes' Params4bit. On a CPU with AVX512-BF16 the first forward in eval mode packs the weight anew."""
    state = p.quant_state
    if state is None:
        raise ValueError(f"{name}: a Params4bit that is not quantised yet; move the model to its device first")
    packs = p.device.type == "cpu" and bool(getattr(module, PACKS, False))
    if packs and not getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}: its next forward on this CPU replaces its scales (bitsandbytes packs 4-bit weights then); call "
            "model.eval() and the model once, under torch.no_grad(), before zokern.scales(model)"
        )
    if state.nested:
        raise ValueError(
            f"{name}: its scales are quantised themselves (absmax in {_name(state.absmax)}), so no pass can write them; "
            "quantise the model with compress_statistics=False (transformers: bnb_4bit_use_double_quant=False)"
        )
    yield "absmax", _checked(f"{name}.absmax", state.absmax)


def _wrapped(name: str, p: Tensor) -> Iterator[Named]:
    """torchao's tensors, which say what they are made of; those of before 0.14 have another such tensor inside."""
    scale = getattr(p, "scale", None)
    inner = getattr(p, "tensor_impl", None)
    if not isinstance(scale, Tensor) and isinstance(inner, Tensor):
        scale = getattr(inner, "scale", None)
    if not isinstance(scale, Tensor):
        parts = ", ".join(p.__tensor_flatten__()[0])  # type: ignore[attr-defined]
        raise ValueError(
            f"{name}: a {type(p).__name__} has no scales of its own that could be perturbed in place (it has {parts}); "
            "quantise this weight in another way, for example with torchao's Int8WeightOnlyConfig or Float8WeightOnlyConfig"
        )
    yield "scale", _checked(f"{name}.scale", scale)


def _checked(name: str, scale: Tensor) -> Tensor:
    if scale.dtype not in _checks.DTYPES:
        raise ValueError(
            f"{name} has {_name(scale)} numbers, which no pass writes (they are scales of a quantised kind themselves); "
            "quantise the model so that its scales are float32, bfloat16 or float16"
        )
    return scale


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")

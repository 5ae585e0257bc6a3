"""What no integration can do yet. It is refused by name before anything is trained, with the way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MIXED_FLOAT16 = ("fp16", "16", "16-mixed")  # as accelerate and Lightning call it
ENGINES = {
    "deepspeed": "DeepSpeed",
    "fsdp": "FSDP",
    "megatron_lm": "Megatron-LM",
    "model_parallel": "a model-parallel strategy",
    "xla": "XLA",
}
AVERAGES = ("StochasticWeightAveraging", "WeightAveraging", "BEMACallback")  # Lightning's and TRL's


def refuse(integration: str, *, precision: str = "", scaler: bool = False, engine: str = "", cut: str = "") -> None:
    """Asks whether zokern can train under these facts, and changes nothing.

    Args:
        integration: who asks, the first word of the message.
        precision: the framework's own name of its mixed precision, for example "no", "bf16", "16-mixed".
        scaler: whether it scales losses by a GradScaler.
        engine: the framework's name of what holds the weights; those in ENGINES cut them up or own their steps. Upper and
            lower case, "-" and "_" are the same.
        cut: what else holds the weights or the batches in parts, in words; "" for nothing.

    Raises:
        NotImplementedError: for float16 with a GradScaler, 8-bit floats, the engines of ENGINES, and what is cut.
    """
    kind = ENGINES.get(engine.lower().replace("-", "_"), cut)
    if kind:
        raise NotImplementedError(
            f"{integration}: zokern does not train under {kind}, which holds the weights in parts or makes the steps "
            "itself. Leave it out: forward passes alone need the memory of inference, so the model often fits, and each "
            "process that torchrun starts may have the whole of it"
        )
    if scaler or precision.lower() in MIXED_FLOAT16:
        raise NotImplementedError(
            f"{integration}: mixed precision {precision or 'fp16'!r} has a GradScaler, which scales gradients, and here "
            "are none. Take bf16, or a model with float16 weights without mixed precision"
        )
    if "fp8" in precision.lower() or precision.lower().startswith("transformer-engine"):
        raise NotImplementedError(
            f"{integration}: mixed precision {precision!r} carries scales from one forward to the next, so the forwards of "
            "a step would not be the same function. Take bf16"
        )


def cut(config: Any) -> str:
    """What accelerate's parallelism_config, or None, cuts up, in words; "" for nothing."""
    sizes = {"tp": "tensor", "cp": "context", "sp": "sequence", "dp_shard": "sharded data"}
    found = [word for name, word in sizes.items() if (getattr(config, f"{name}_size", 1) or 1) > 1]
    return f"{' and '.join(found)} parallelism" if found else ""


def averages(callbacks: Iterable[object], fold_every: int) -> None:
    """
    Raises:
        NotImplementedError: where updates wait, for a callback that averages the weights in memory, which lack them, and
            may put its average in their place.
    """
    for one in callbacks if fold_every != 1 else ():
        if any(kind.__name__ in AVERAGES for kind in type(one).__mro__):
            raise NotImplementedError(
                f"fold_every is {fold_every}, and {type(one).__name__} averages the weights in memory, which lack the "
                "updates that wait: give fold_every=1, or leave the callback out"
            )


def best(load_best_model_at_end: bool, fold_every: int) -> None:
    """
    Raises:
        NotImplementedError: where other weights would come in the end, for which nothing may wait, and updates never end
            to wait.
    """
    if load_best_model_at_end and fold_every == 0:
        raise NotImplementedError(
            "fold_every is 0, and load_best_model_at_end puts the best weights in the place of those that all updates wait "
            "for: give fold_every above 0, or load_best_model_at_end=False"
        )

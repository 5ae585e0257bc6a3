"""What cannot work in transformers' Trainer with forwards alone: refused at construction, by name, with the way out."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

from torch import nn

from zokern.integrations import limits
from zokern.optim import ZerothOrderOptimizer, frameworks

RATIO = (
    "its loss is a ratio to a detached copy of the policy, which is 1 at any weights; "
    "zokern.integrations.trl.RewardTrainer measures the reward itself"
)
# Trainers whose loss, as a number, says something else than its gradient.
DETACHED = {
    "GRPOTrainer": RATIO,
    "RLOOTrainer": RATIO,
    "PPOTrainer": RATIO,
    "AsyncGRPOTrainer": RATIO,
    "KTOTrainer": "its loss has a detached divergence in it, which forwards cannot leave out; take DPOTrainer",
}
DETACHED_LOSS = {
    "dft": 'weighs tokens by detached probabilities, which forwards cannot leave out; take loss_type="nll"'
}


def order(cls: type, ours: type) -> None:
    """
    Raises:
        TypeError: where a trainer comes after ours in the order of bases, whose own training_step ours would hide.
    """
    after = cls.__mro__[cls.__mro__.index(ours) + 1 :]
    base = next(one for one in ours.__mro__ if one.__name__ == "Trainer")
    hidden = [one.__name__ for one in after[: after.index(base)] if "training_step" in vars(one)]
    if hidden:
        mine = next(one for one in cls.__mro__ if one.__module__ == ours.__module__)
        raise TypeError(
            f"class {cls.__name__}: {hidden[0]} has a training_step of its own, which {mine.__name__}'s would hide; write "
            f"class {cls.__name__}({hidden[0]}, {mine.__name__})"
        )


def trainer(cls: type) -> None:
    """
    Raises:
        TypeError: for a trainer whose loss carries no signal for forwards.
    """
    for one in cls.__mro__:
        if one.__name__ in DETACHED and one.__module__.startswith("trl."):
            raise TypeError(f"{one.__name__} cannot be trained with forwards only: {DETACHED[one.__name__]}")


def arguments(args: Any) -> None:
    """Of TrainingArguments, or None.

    Raises:
        NotImplementedError, ValueError: naming the argument.
    """
    if args is None:
        return
    engine = "deepspeed" if getattr(args, "deepspeed", None) else "fsdp" if getattr(args, "fsdp", None) else ""
    limits.refuse("ZOTrainer", precision="fp16" if getattr(args, "fp16", False) else "", engine=engine)
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"ZOTrainer: the Trainer would copy the model to {args.n_gpu} GPUs in every forward. Run on one "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    default = {one.name: one.default for one in dataclasses.fields(args)}.get("optim")
    if args.optim != default:
        raise ValueError(
            f"optim is {getattr(args.optim, 'value', args.optim)!r}, and the steps are zokern's: leave it out. The method "
            "is MeZO, or what ZOTrainer(..., zo=) names"
        )
    if getattr(args, "use_weighting", False):
        raise ValueError("use_weighting=True weighs pairs by detached probabilities, which forwards cannot leave out")
    kind = getattr(args, "loss_type", None)
    for one in [kind] if isinstance(kind, str) else kind or []:
        if one in DETACHED_LOSS:
            raise ValueError(f"loss_type={one!r} {DETACHED_LOSS[one]}")


# Of TrainingArguments; what is about gradients, and Adam's own.
WITHOUT_EFFECT = ("max_grad_norm", "gradient_checkpointing", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
# By the newer name; transformers gives both the same value, so that it cannot be told which was set.
RENAMED = {"gradient_checkpointing": "activation_checkpointing"}


def without_effect(args: Any) -> list[str]:
    """Those that somebody has set to something, as `name=value`; by both names, where there are two."""
    default = {one.name: one.default for one in dataclasses.fields(args)}
    found = []
    for old in WITHOUT_EFFECT:
        names = [name for name in (RENAMED.get(old), old) if name in default]
        value = getattr(args, names[0]) if names else None
        if value and value != default[names[0]]:
            found.append(f"{' or '.join(names)}={value!r}")
    return found


def sharded(model: Any) -> None:
    """
    Raises:
        NotImplementedError: for a model that is loaded in parts.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False) or any(
        type(p).__name__ == "DTensor" for p in model.parameters()
    ):
        limits.refuse("ZOTrainer", cut="a model that is loaded in shards (distributed_config, tp_plan)")


def accelerator(made: Any) -> None:
    """What the environment may have chosen, past the arguments.

    Raises:
        NotImplementedError: naming it.
    """
    engine = str(getattr(made.distributed_type, "value", made.distributed_type))
    limits.refuse(
        "ZOTrainer", engine=engine, precision=made.mixed_precision, scaler=getattr(made, "scaler", None) is not None,
        cut=limits.cut(getattr(made, "parallelism_config", None)),
    )  # fmt: skip


def inner(optimizer: Any) -> ZerothOrderOptimizer | None:
    """zokern's optimizer, inside what is put around it."""
    found = frameworks.bare(optimizer)
    return found if isinstance(found, ZerothOrderOptimizer) else None


def foreign(cls: type, optimizer: Any) -> NoReturn:
    """
    Raises:
        TypeError: a trainer has made an optimizer of its own, which is none of zokern's.
    """
    maker = next(one.__name__ for one in cls.__mro__ if "create_optimizer" in vars(one))
    made = getattr(optimizer, "optimizer", optimizer)
    raise TypeError(
        f"{cls.__name__}: the optimizer is a {type(made).__name__}, which {maker}.create_optimizer has made; leave that "
        "out, and give the method as zo=, or a zokern optimizer as optimizers="
    )


def optimizer(given: Any, model: nn.Module, maximize: bool) -> None:
    """Of `optimizers`. maximize: the trainer has rewards.

    Raises:
        TypeError: if it is none of zokern's.
        ValueError: if it trains nothing of the model, or goes the other way.
    """
    if not isinstance(given, ZerothOrderOptimizer):
        raise TypeError(
            f"optimizers has a {type(given).__name__}; give one of zokern's, for example "
            "(zokern.MeZO(model, lr=1e-6), None), or leave it out and give zo="
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in given.param_groups for p in group["params"]):
        raise ValueError(
            "optimizers: none of its parameters is one of model's; make it of the same module, after get_peft_model and "
            "whatever else replaces parameters"
        )
    if bool(given.maximize) is not maximize:
        wanted = "reward is to rise" if maximize else "loss is to fall"
        raise ValueError(
            f"optimizers: {type(given).__name__} has maximize={bool(given.maximize)}, and the trainer's {wanted}; give "
            f"maximize={maximize}"
        )

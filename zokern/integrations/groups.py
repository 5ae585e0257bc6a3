"""The parameters that a trainer trains, in its groups: with their names, weight decay and rates."""

from __future__ import annotations

from typing import Any

from torch import nn

from zokern.integrations.chosen import Groups

LISTS = ("params", "optimizer_dict")  # where a trainer's get_optimizer_cls_and_kwargs has groups of its own


def of(trainer: Any, model: nn.Module, base: type) -> Groups:
    """Those that `base`, transformers' Trainer, would make; or the trainer's own, where it has some, as that of
    sentence-transformers, which has rates by name.

    Raises:
        ValueError: for a model that is frozen, and for a trainer that has parameters in its groups which are none of the
            model's.
    """
    every = list(model.named_parameters())
    trained = [(name, p) for name, p in every if p.requires_grad]
    if not trained:
        raise ValueError(
            f"model: none of its {len(every)} tensors has requires_grad=True, so nothing would be trained; call "
            "requires_grad_() on what is to be"
        )
    own = _own(trainer, model, base)
    if own is not None:
        return _named(own, trained, type(trainer).__name__)
    if not trainer.args.weight_decay:
        return [{"params": trained}]
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = [
        {"params": [one for one in trained if (one[0] in decayed) is decays], "weight_decay": share}
        for decays, share in ((True, trainer.args.weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def _own(trainer: Any, model: nn.Module, base: type) -> Groups | None:
    ask = type(trainer).get_optimizer_cls_and_kwargs
    if ask is base.get_optimizer_cls_and_kwargs:  # type: ignore[attr-defined]
        return None
    _, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    return next((list(settings[name]) for name in LISTS if name in settings), None)


def _named(groups: Groups, trained: list[tuple[str, nn.Parameter]], trainer: str) -> Groups:
    names = {id(p): name for name, p in trained}
    strange = [tuple(p.shape) for group in groups for p in group["params"] if id(p) not in names]
    if strange:
        raise ValueError(
            f"{trainer}: {len(strange)} of the parameters that it trains, of the shapes {strange[:4]}, are none of "
            "model's but the loss's own. Those of a guide or teacher: set requires_grad_(False). Others: give an optimizer "
            "of both, optimizers=(zokern.MeZO(torch.nn.ModuleList([model, loss]), lr=1e-6), None)"
        )
    known = ("lr", "weight_decay")
    return [
        {"params": [(names[id(p)], p) for p in group["params"]], **{k: group[k] for k in known if k in group}}
        for group in groups if group["params"]
    ]  # fmt: skip

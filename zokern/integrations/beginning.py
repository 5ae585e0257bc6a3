"""What is told at the beginning of a training: of what somebody has set, and of what somebody may want to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from zokern.integrations import published, refused
from zokern.optim import METHODS, ZerothOrderOptimizer, rate

FORWARDS = 200  # of a run that may show whether it learns


def lrs(optimizer: ZerothOrderOptimizer) -> list[float]:
    """Of the groups, that from which a schedule makes each step's; the present one where there is no such schedule."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def told(trainer: Any, optimizer: ZerothOrderOptimizer, args: Any, state: Any) -> Iterator[str]:
    """trainer: a ForwardOnly, whose checkpoint is loaded, if there is one."""
    if unused := refused.without_effect(args):
        yield f"without effect, as there are no gradients: {', '.join(unused)}"
    has = lrs(optimizer)
    for asked, own, group in zip(trainer._asked_lrs or has, has, optimizer.param_groups, strict=True):
        if asked != own and "initial_lr" in group:  # else it may have been lowered by the run (reduce_lr_on_plateau)
            yield (
                f"learning_rate {asked:g} is not used: the run goes on with its checkpoint's, {own:g}. To have it, begin a "
                "new run from the checkpoint's weights: from_pretrained(checkpoint), and no resume_from_checkpoint"
            )
            break
    if trainer._chosen is not None:
        if not trainer.maximize:  # the rule is of losses
            params = list(trainer.model.parameters())
            trained = [p for p in params if p.requires_grad]
            most = max(range(len(has)), key=lambda g: sum(p.numel() for p in optimizer.param_groups[g]["params"]))
            many = sum(p.numel() for p in trained)
            if far := rate.note(optimizer, has[most], many, len(trained) == len(params)):
                yield far
        if not state.global_step and "eps" not in trainer._chosen.settings:
            yield from _eps(trainer, optimizer)
    if not state.is_hyper_param_search:
        with contextlib.suppress(NotImplementedError):  # somebody's own method, which does not say how many
            yield from short(state.max_steps, optimizer.forwards())


def _eps(trainer: Any, optimizer: ZerothOrderOptimizer) -> Iterator[str]:
    """Of an adapter, where the method's default is not what is published for it."""
    default = type(optimizer).settings["eps"].default
    if other := published.other_eps(trainer.model, default):
        eps, whose = other
        settings: dict[str, Any] = {"eps": eps}
        if getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
            give = f"optimizer_cls_and_kwargs=({trainer._chosen.cls.__name__}, {settings})"
        else:
            method = next(name for name, cls in METHODS.items() if cls is trainer._chosen.cls)
            give = f"zo={settings if method == trainer.method else {'method': method, **settings}}"
        yield f"eps is {default:g}, the default; {whose} {eps:g}: {give} (docs/trainer.md#lora)"


def short(steps: int, forwards: int) -> Iterator[str]:
    """Of a run of few steps. forwards: of one."""
    if steps * forwards < FORWARDS:
        yield (
            f"the run has {steps} steps, {steps * forwards} forwards: enough to see that all of it runs; whether it "
            "learns, some hundred steps show (max_steps, docs/choose.md)"
        )

"""A LightningModule that is trained by forward passes, with the Trainer and the training_step that it has.

    class Tuner(ForwardOnly, lightning.LightningModule):
        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return zokern.MeZO(self, lr=1e-6)

Accumulation, schedulers, steps and checkpoints are Lightning's own, as its automatic optimization has them. Two of its
hooks are other here: `optimizer_step` lets the step be made over all micro-batches where Lightning would make its own, and
`backward` does nothing. Lightning 2.x, by either name, `lightning.pytorch` or `pytorch_lightning`.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from zokern._checks import ZokernWarning
from zokern.integrations import fitting, looks, parts
from zokern.integrations.logged import Logged, MicroBatch
from zokern.integrations.waiting import Waiting
from zokern.optim import frameworks

_NAMES = ("lightning", "pytorch_lightning")
if not any(map(importlib.util.find_spec, _NAMES)):
    raise ImportError("zokern.integrations.lightning needs Lightning: pip install lightning")

_SAVED = "zokern_waiting"  # in a checkpoint: arguments of the training steps of micro-batches that wait
_SAMPLER = (
    "give Trainer(use_distributed_sampler=False), and seed what shuffles the same on all of them, as "
    "lightning.seed_everything does"
)
_OTHERS = (
    "the checkpoint has micro-batches that wait in each of {} processes, and now there are {}: they are in no step. Resume "
    "with as many, or save where an accumulation ends"
)
_UNUSED = "the last of an epoch ends an accumulation, but a training that is stopped within one leaves them"


class _Work:
    """What the mixin knows of one module. optimizer: whose step Lightning makes now; made: it has been made. now: the
    micro-batch that a probe evaluates. parts: who has which part of the batches; apart: processes may have done unequal
    work since the last step; compared: they have been handed the same batches, where they are to be."""

    def __init__(self) -> None:
        self.waiting = Waiting()
        self.loaded = False  # they come from a checkpoint, and may be on another device
        self.optimizer: Any = None
        self.made = False
        self.now: MicroBatch | None = None
        self.parts = parts.Parts()
        self.apart = self.compared = False

    def meet(self, batches: list[Any]) -> None:
        """Before a step. Where processes may have done unequal work, they wait for each other."""
        if self.apart:
            self.apart = False
            if self.parts != parts.Parts():
                self.optimizer.wait_for_ranks()
            if self.parts.copies > 1 and not self.compared:
                parts.check_same(self.parts, batches, _SAMPLER)
                self.compared = True


class ForwardOnly:
    """A mixin, left of LightningModule: `class Tuner(ForwardOnly, LightningModule)`, or `class Tuner(ForwardOnly, Mine)`.

    `training_step` returns the loss, or a dict with "loss", as ever. It is run under torch.no_grad() for each probe of a
    step and each micro-batch; a dict or list that it is given is a copy, so it may take entries out.
    `configure_optimizers` returns one zokern optimizer, with or without schedulers in any of Lightning's forms.
    `Trainer(accumulate_grad_batches=n)` makes one step over n micro-batches, and `trainer.global_step` counts steps. What
    training_step logs is logged once for each micro-batch: the mean over the step's forwards. torchmetrics' objects in it
    see every forward: update them in validation_step.

    A checkpoint within an accumulation has the micro-batches that wait. Not called, as there are no gradients:
    `on_before_optimizer_step`, `configure_gradient_clipping`. An `optimizer_step` of your own ends in
    `super().optimizer_step(...)`.

    Several processes (strategy="ddp") train one model where the optimizer says what they share out:
    zokern.MeZO(self, lr=1e-6, parallel="data"), or "directions" with Trainer(use_distributed_sampler=False). Lightning's
    strategy makes no DistributedDataParallel then, whose gradients would have memory.

    What it refuses, it refuses before anything is trained.

    Raises:
        TypeError: for the wrong order of base classes, an optimizer that is not zokern's, a training_step that takes a
            dataloader_iter, automatic_optimization = False.
        ValueError: for processes with unequal numbers of batches, and an optimizer whose ranks are not all of them.
        NotImplementedError: for what no integration can do yet (limits.py), gradient clipping, a compiled LightningModule.
    """

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        base = next((one for one in cls.__mro__ if _is_lightnings(one)), None)
        if base is None:
            return
        if cls.__mro__.index(base) < cls.__mro__.index(ForwardOnly):
            raise TypeError(
                f"ForwardOnly comes before LightningModule: class {cls.__name__}(ForwardOnly, LightningModule)"
            )
        for name, around in _AROUND.items():
            written = getattr(cls, name)
            own = name not in _THEIRS or written is not getattr(base, name)
            if own and not hasattr(written, "_of_zokern"):
                wrapped = functools.wraps(written)(around(written))
                wrapped._of_zokern = True  # type: ignore[attr-defined]
                setattr(cls, name, wrapped)

    def micro_batch_weight(self, batch: Any) -> float | None:
        """The weight of a micro-batch among those of its step, >= 0, as its number of tokens; None: all are equal."""
        return None

    def backward(self, loss: Tensor, *args: Any, **named: Any) -> None:
        """Lightning's hook: the step has been made already."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any]) -> None:
        """Lightning's hook: its closure calls training_step, which makes the step."""
        work = _work(self)
        work.optimizer, work.made = frameworks.bare(optimizer), False
        try:
            optimizer_closure()
        finally:
            work.optimizer = None
        if not work.made:
            raise RuntimeError(
                "no step was made: training_step was replaced after its class was made, and ForwardOnly does not see it; "
                "define it in the class"
            )

    def log(self, name: str, value: Any, *args: Any, **named: Any) -> None:
        """Lightning's. Within a step it is put off until the step has been made."""
        now = _work(self).now
        if now is None:
            super().log(name, value, *args, **named)  # type: ignore[misc]
        else:
            now.log(name, value, args, named)


def _is_lightnings(kind: type) -> bool:
    return kind.__name__ == "LightningModule" and kind.__module__.split(".")[0] in _NAMES


def _work(module: Any) -> _Work:
    return cast(_Work, vars(module).setdefault("_zokern", _Work()))


def _training_step(written: Callable[..., Any]) -> Callable[..., Any]:
    def training_step(self: Any, *args: Any, **named: Any) -> Any:
        work = _work(self)
        if work.now is not None or not _in_fit(self):  # from a closure, or by hand
            return written(self, *args, **named)
        if work.loaded:
            work.waiting.batches = [one.moved(self) for one in work.waiting.batches]
            work.loaded = False
        one = MicroBatch(args)
        waiting = work.waiting.and_one(one, self.micro_batch_weight(args[0]), {})
        if work.optimizer is None:
            work.waiting = waiting
            # Lightning refuses None in several processes, where a step that is left out would leave the others waiting.
            return torch.zeros((), device=self.device) if self.trainer.world_size > 1 else None
        return _step(self, work, written, waiting)

    return training_step


def _trainer(module: Any) -> Any:
    """A module's Trainer, or None."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def _in_fit(module: Any) -> bool:
    """Whether the training loop of a Trainer calls."""
    return getattr(_trainer(module), "training", False) is True


def _fits(module: Any) -> bool:
    """Whether a Trainer's fit is under way, or being set up."""
    state = getattr(_trainer(module), "state", None)
    return state is not None and state.fn == "fit"


def _step(module: Any, work: _Work, written: Callable[..., Any], waiting: Waiting) -> Any:
    """One step over the micro-batches. Returns what training_step has returned last, with the step's loss."""
    returned: Any = None

    def closure(one: MicroBatch) -> Any:
        nonlocal returned
        work.now = one
        try:
            returned = written(module, *one.arguments())
        finally:
            work.now = None
        if not isinstance(returned, Mapping):
            return returned
        if "loss" not in returned:
            raise TypeError(f"training_step returned a dict without 'loss', it has {', '.join(map(repr, returned))}")
        return returned["loss"]

    work.meet([one.args[0] for one in waiting.batches])
    for one in waiting.batches:
        one.logged = {}  # a step before may have been broken off
    with looks.already(module):
        loss = work.optimizer.step(closure, waiting.batches, batch_weights=waiting.weights or None)
    work.waiting, work.made = Waiting(), True
    Logged(module, waiting.batches).tell()
    # Lightning divides by this, as a share of an accumulation; it is the loss of all of it.
    loss = loss * module.trainer.accumulate_grad_batches
    return {**returned, "loss": loss} if isinstance(returned, Mapping) else loss


def _first(own: Callable[..., None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A hook of the mixin's before the class's, which often does not call super()."""

    def around(written: Callable[..., Any]) -> Callable[..., Any]:
        def hook(self: Any, *args: Any, **named: Any) -> Any:
            own(self, *args, **named)
            return written(self, *args, **named)

        return hook

    return around


def _setup(module: Any, stage: str) -> None:
    if stage == "fit":
        work = _work(module)
        work.waiting.tell("when another fit began", _UNUSED)
        work.waiting, work.loaded = Waiting(), False
        fitting.leave_bare(module.trainer.strategy, ForwardOnly)


def _on_fit_start(module: Any) -> None:
    work = _work(module)
    work.parts, work.apart, work.compared = fitting.check(module), True, False
    looks.trains(module, module.trainer.optimizers[0])


def _on_train_start(module: Any) -> None:
    fitting.check_lengths(module.trainer)


def _apart(module: Any) -> None:
    _work(module).apart = True


def _on_train_end(module: Any) -> None:
    looks.fold(module)
    work = _work(module)
    work.waiting.tell("when the training ended", _UNUSED)
    work.waiting = Waiting()


def _on_save_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    _apart(module)
    waiting = _work(module).waiting
    trainer = _trainer(module)
    if trainer is not None and trainer.world_size > 1 and _fits(module):  # one of them writes it, all come here
        every = fitting.of_all_ranks(trainer, [one.on_host(module).args for one in waiting.batches], waiting.weights)
        if waiting:
            checkpoint[_SAVED] = {"ranks": every}
    elif waiting:
        checkpoint[_SAVED] = {"arguments": [one.args for one in waiting.batches], "weights": waiting.weights}


def _on_load_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    work, saved = _work(module), checkpoint.get(_SAVED)
    if saved is not None and _fits(module):  # load_from_checkpoint takes the weights alone
        ranks = saved.get("ranks", [saved])
        if len(ranks) != module.trainer.world_size:
            warnings.warn(_OTHERS.format(len(ranks), module.trainer.world_size), ZokernWarning, stacklevel=2)
            return
        saved = ranks[module.trainer.global_rank]
        work.loaded = True
        work.waiting.batches = [MicroBatch(tuple(args)) for args in saved["arguments"]]
        work.waiting.weights = list(saved["weights"])


_THEIRS = {"training_step", *looks.LOOKS}  # those that Lightning has itself are left as they are
_AROUND: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "training_step": _training_step,
    **dict.fromkeys(looks.LOOKS, looks.showing),
    "setup": _first(_setup),
    "on_fit_start": _first(_on_fit_start),
    "on_train_start": _first(_on_train_start),
    "on_train_epoch_start": _first(_apart),
    "on_validation_model_train": _first(_apart),
    "on_train_end": _first(_on_train_end),
    "on_save_checkpoint": _first(_on_save_checkpoint),
    "on_load_checkpoint": _first(_on_load_checkpoint),
}

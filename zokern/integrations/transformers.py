"""transformers' Trainer, and every trainer that derives from it, with zeroth-order steps: forwards only, no backward.

    from zokern.integrations.transformers import ZOTrainer

    trainer = ZOTrainer(model, args, train_dataset=data)                              # MeZO, lr and schedule from args
    trainer = ZOTrainer(model, args, train_dataset=data, zo={"method": "hizoo", "eps": 1e-3})
    trainer = ZOTrainer(model, args, train_dataset=data, optimizers=(zokern.MeZO(model, lr=1e-6), None))

    class ZOSFTTrainer(SFTTrainer, ForwardOnly): ...                                  # any other trainer: it comes first

The Trainer's loop stays as it is. What it calls the training step of a micro-batch collects them; with the last one of a
step, the whole step is made, each of its forwards over all of them; the loop's own optimizer.step() is nothing then.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from zokern.integrations import beginning, constructors, groups, refused, shown
from zokern.integrations.books import Books
from zokern.integrations.chosen import Chosen
from zokern.integrations.hooks import End, Hooks
from zokern.integrations.notes import Notes
from zokern.integrations.running import Journaled
from zokern.integrations.shares import Shares
from zokern.integrations.together import Nothing, Together, handing_out
from zokern.optim import ZerothOrderOptimizer, pairing
from zokern.scales import keep_codes

try:
    from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped,import-not-found]
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "zokern.integrations.transformers needs transformers and accelerate; install zokern[trainer]"
    ) from error


class ForwardOnly(Together):
    """Makes a trainer take zeroth-order steps: `class ZOSFTTrainer(SFTTrainer, ForwardOnly)`, the other trainer first.

    A step evaluates the trainer's own `compute_loss` at perturbed weights, over all micro-batches of the step, and moves
    the weights along the directions it has drawn; the method's page in docs/methods has the equations. The model stays in
    training mode, as under any Trainer; dropout draws the same in all forwards of a step.

    From `args`: learning_rate, lr_scheduler_type, warmup, weight_decay (of what the Trainer decays), accumulation by the
    Trainer's token counts, evaluation, callbacks, best model, label smoothing, bf16, torch_compile, resume. Gradients are
    never made: max_grad_norm and optim have nothing to do. Logged beside the loss: projected_gradient (not for ES,
    which measures none), forwards, skipped_steps, flat_steps and large_steps, all of the run so far.

    These are beside the trainer's own, and given by name; a class may have them as attributes.

    Args:
        zo: a method's name, or a mapping with "method" and settings of its class (docs/methods.md). Default: "mezo".
            Goes without `optimizers`, which takes a zokern optimizer in its place.
        journal: write `journal.zkj` in args.output_dir, from which the tuned weights can be made again; a run that is
            resumed writes on in it. An earlier run's is renamed. Not in hyperparameter_search. Default: True.
        dropout: False leaves out dropout and what else draws in training mode, as the papers do. Default: True.

    Under torchrun several processes train one model, each with its part of the batches; zo={"parallel": "directions"}
    gives all the same batches, and each some of a step's probes (docs/trainer.md). The first writes the journal.

    Raises:
        TypeError, ValueError: at construction, for what cannot work, with the way out: more than one GPU in a process, fp16
            with its loss scaler, DeepSpeed, FSDP, trainers whose loss is a ratio to a detached copy (GRPO and its kin), an
            optimizer whose process_group is None or of other ranks than all.
    """

    zo: str | Mapping[str, Any] | None = None
    journal: bool = True
    dropout: bool = True
    OWN = ("zo", "journal", "dropout")
    maximize = False  # what a probe returns is a loss
    method = "mezo"  # without zo
    optimizer: Any  # zokern's, and what accelerate puts around it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refused.order(cls, ForwardOnly)
        if "__init__" not in vars(cls):  # a trainer that comes first does not know our arguments
            type.__setattr__(cls, "__init__", constructors.taking_own(cls, ForwardOnly))
        _look(cls)

    def __init__(self, *args: Any, **named: Any) -> None:
        constructors.set_own(self, named)
        refused.trainer(type(self))
        given = named.get("args", args[1] if len(args) > 1 else None)
        refused.arguments(given)
        self.begin_books()
        self.notes = vars(self).get("notes") or Notes()
        self._stepped = self._begun = False  # a step was made; a training has begun
        self._asked_lrs: list[float] | None = None  # those that a checkpoint's take the place of
        self._journaled, self._shown = Journaled(), shown.Shown()
        super().__init__(*args, **named)
        refused.arguments(self.args)
        refused.accelerator(self.accelerator)
        refused.sharded(self.model)
        keep_codes(self.model)
        if self.optimizer is not None:
            if self.zo is not None:
                raise ValueError("zo and optimizers are both given; leave one out")
            refused.optimizer(self.optimizer, self.model, self.maximize)
        self._chosen = None if self.optimizer is not None else self._choice()
        self.join_ranks()
        self.add_callback(Hooks(self))
        self.callback_handler.callbacks.insert(0, End(self))

    @property
    def zo_optimizer(self) -> ZerothOrderOptimizer:
        """zokern's optimizer, inside what accelerate puts around it.

        Raises:
            RuntimeError: before `train`, where it is made from `zo`.
        """
        if self.optimizer is None:
            raise RuntimeError("the optimizer is made by train(); call create_optimizer() to have it before")
        return refused.inner(self.optimizer) or refused.foreign(type(self), self.optimizer)

    # ----------------------------------------------------------------------------------------- what the Trainer asks for

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The zokern optimizer over what the Trainer would train, in its two groups: with weight decay and without."""
        model = self.model if model is None else model
        if self.optimizer is None:
            chosen = self._chosen or self._choice()
            self.optimizer = chosen.build(
                model, groups.of(self, model, Trainer), self.args.learning_rate, maximize=self.maximize
            )
        return self.optimizer

    def _choice(self) -> Chosen:
        given = getattr(self, "optimizer_cls_and_kwargs", None)
        if given is not None:
            if self.zo is not None:
                raise ValueError("zo and optimizer_cls_and_kwargs are both given; leave one out")
            return Chosen.of_class(*given)
        return Chosen.read(self.zo, self.method)

    def begin_books(self) -> None:
        """Of a training: nothing is left of one that was broken off."""
        self._micro: list[Any] = []
        self._losses: list[Tensor] = []  # of the steps since the last line of the log
        self._shares = Shares()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Collects a micro-batch; with the last one of a step makes the step. Returns its loss, 0 before."""
        if not isinstance(inputs, Nothing):
            self._micro.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro = self._micro, []
        self.set_mode(model)
        books, options = Books(self, len(batches)), self.step_options(batches, num_items_in_batch)
        share = self.rank_share(num_items_in_batch) if options.get("reduction") == "sum" else 1.0

        def closure(batch: Any) -> Any:
            with self.compute_loss_context_manager(), self.forward_alone():
                loss = self.probe(model, copy.copy(batch), num_items_in_batch)
            books.counted()
            return loss if share == 1.0 else loss * share

        optimizer = self.zo_optimizer
        self.meet(batches)
        try:
            with self._shown.already():
                loss = optimizer.step(closure, batches, **options)
        finally:
            books.put_back()
        optimizer.step_done = self._stepped = True  # the loop calls optimizer.step() once more
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        loss = (-loss if self.maximize else loss).to(self.args.device)
        self._losses.append(loss)
        return loss

    def set_mode(self, model: nn.Module) -> None:
        """Before each step, as the Trainer does: evaluation leaves it, and callbacks may set it too."""
        model.train()
        if not self.dropout:
            _quieten(model)

    def probe(self, model: nn.Module, batch: Any, num_items_in_batch: Any) -> Any:
        """What a micro-batch says of the weights as they are now: one number, or several by name."""
        return self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)

    def step_options(self, batches: list[Any], num_items_in_batch: Any) -> dict[str, Any]:
        """How the optimizer's step puts micro-batches together: its arguments."""
        return {"reduction": "sum" if self._is_share(batches, num_items_in_batch) else "mean"}

    def _is_share(self, batches: list[Any], num_items_in_batch: Any) -> bool:
        """Whether compute_loss gives each micro-batch's share of the step's loss, and not a mean of its own."""
        known = getattr(self, "loss_is_scaled_for_ga", None)  # transformers' from 5.19 on
        if known is not None:
            return bool(known)
        if self.compute_loss_func is None and not (self.model_accepts_loss_kwargs and num_items_in_batch is not None):
            return False
        several = len(batches) > 1 or self.accelerator.num_processes > 1
        return not several or self._shares.added(self, batches, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **named: Any) -> None:
        if "loss" in logs and self._losses:
            self.tell(logs)
        super().log(logs, *args, **named)

    def tell(self, logs: dict[str, float]) -> None:
        """Adds to a line of the log what is known of the steps since the last one. Waits for the device."""
        logs.pop("grad_norm", None)  # of no gradients: 0.0 where a Trainer asks for it by another name
        losses, self._losses = torch.stack(self._losses), []
        finite = losses[torch.isfinite(losses)]
        optimizer = self.zo_optimizer
        logs["loss"] = float(finite.mean()) if len(finite) else float("nan")
        if optimizer.measures_slope:
            logs["projected_gradient"] = float(optimizer.metrics["projected_gradient"])
        logs["forwards"] = optimizer.counters["forwards"]
        for name in ("skipped_steps", "flat_steps", "large_steps"):
            logs[name] = getattr(optimizer, name)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """There are no gradients."""

    def train(self, *args: Any, **named: Any) -> Any:
        self._begun, self._asked_lrs = False, None
        try:
            return super().train(*args, **named)
        finally:
            self._micro = []
            optimizer = refused.inner(self.optimizer)
            if optimizer is not None:
                optimizer.step_done = False  # a callback may have broken the loop off before its own step()
            self.end_run()

    def folded(self) -> AbstractContextManager[None]:
        """Inside, between steps, the model computes with updates that wait (fold_every): `with trainer.folded():` around
        what a callback asks of it. Evaluation and predictions are inside; inside a step, and again, it is nothing."""
        return self._shown.by(refused.inner(self.optimizer))

    def end_run(self) -> None:
        """Adds what waits to the weights, unless that is never to be (fold_every=0), and ends the journal, which has that
        too."""
        try:
            optimizer = refused.inner(self.optimizer)
            if optimizer is not None and optimizer.fold_every:
                optimizer.fold()
        finally:
            self._journaled.close()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._begun and checkpoint is not None:  # an attempt was given up, and another begins with a smaller batch
            self.end_run()
            self._load_from_checkpoint(checkpoint)  # the Trainer would load all but the weights
        optimizer = refused.inner(self.optimizer)
        self._asked_lrs = None if optimizer is None or checkpoint is None else beginning.lrs(optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)


def _look(cls: type[ForwardOnly]) -> None:
    """Where a trainer looks at the model, it has what waits; other weights come when nothing does. Also in the methods of
    trainers that come first."""
    shown.around(cls, "evaluation_loop", _evaluating)
    shown.around(cls, "prediction_step", ForwardOnly.folded)
    shown.around(cls, "_load_best_model", _ended)
    shown.around(cls, "get_train_dataloader", handing_out)


def _evaluating(trainer: ForwardOnly) -> AbstractContextManager[None]:
    """With bf16_full_eval, outside of train(), the Trainer casts the weights themselves: nothing may wait for them."""
    optimizer, args = refused.inner(trainer.optimizer), trainer.args
    casts = not trainer.is_in_train and (args.bf16_full_eval or args.fp16_full_eval)
    if optimizer is not None and casts and not trainer._shown.inside:
        optimizer.fold()
    return trainer.folded()


@contextlib.contextmanager
def _ended(trainer: ForwardOnly) -> Iterator[None]:
    """The journal ends with the weights that training had."""
    trainer.end_run()
    yield


_look(ForwardOnly)


def _quieten(model: nn.Module) -> None:
    """Leaves out what draws, and nothing else of training mode. Of modules that have a dropout in them, only their own
    mode: BERT's attention takes its dropout's share while it is in training mode itself."""
    for module in model.modules():
        if pairing.may_draw(module):
            module.training = False


class ZOTrainer(ForwardOnly):
    """transformers' Trainer with zeroth-order steps."""

    __doc__ += (ForwardOnly.__doc__ or "").partition("\n")[2]

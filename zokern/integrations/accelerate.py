"""A loop of one's own with accelerate: a step over all micro-batches of an accumulation.

    opt = zokern.integrations.accelerate.prepare(accelerator, zokern.MeZO(model, lr=1e-6))
    model, loader, scheduler = accelerator.prepare(model, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = opt.step(lambda b: model(**b).loss, batch)    # None until the accumulation is complete
            scheduler.step()

Several processes (accelerate launch, torchrun) train one model where the optimizer says what they share out, made after the
Accelerator: zokern.MeZO(model, lr=1e-6, parallel="data"). Its model gets no DistributedDataParallel if it is prepared after
the optimizer. For parallel="directions" the training's DataLoader comes from `prepare_loader`.

accelerate 1.x: its own wrapper calls an optimizer's step with the last closure of each accumulation alone, which is right
where gradients have been added up before, and loses all other micro-batches where there are none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zokern.distributed import finding
from zokern.integrations import limits, parts
from zokern.integrations.waiting import Waiting
from zokern.optim.base import ZerothOrderOptimizer
from zokern.scales import keep_codes

try:
    from accelerate import Accelerator  # type: ignore[import-untyped,import-not-found]
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped,import-not-found]
except ImportError as error:
    raise ImportError("zokern.integrations.accelerate needs accelerate: pip install accelerate") from error

_MISSING: Any = object()
_ALONE = parts.Parts()
_NO_CLOSURE = (
    "step needs a closure and a batch, for example opt.step(lambda b: model(**b).loss, batch), in place of "
    "accelerator.backward(loss) and opt.step(): zokern evaluates the loss itself, several times a step, without gradients"
)
_NO_BATCH = (
    "step needs the micro-batch as its second argument under gradient accumulation, for example "
    "opt.step(lambda b: model(**b).loss, batch): the step evaluates all micro-batches again, when the last has come, and a "
    "closure without an argument would then see the last one alone"
)
_UNUSED = (
    "give the DataLoader to accelerator.prepare (then the end of the data is a step too), or end the loop where "
    "accelerator.sync_gradients is True"
)
_LOADER = (
    "its DataLoader has to come from zokern.integrations.accelerate.prepare_loader(accelerator, optimizer, loader)"
)
_UNSAVED = (
    "a checkpoint does not have them, so a run that goes on from it is another one; save where accelerator.sync_gradients "
    "is True"
)


def prepare(accelerator: Accelerator, optimizer: Any) -> ForwardOnlyOptimizer:
    """The optimizer for a loop with `accelerator.accumulate()`, known to the accelerator: it saves and loads it.

    Args:
        accelerator: an accelerate.Accelerator.
        optimizer: a zokern optimizer, or what `accelerator.prepare` made of one, which is replaced in the accelerator
            and in its schedulers. Both orders work: before `accelerator.prepare` of the rest, or after it.

    Raises:
        TypeError: for what is no Accelerator, or no optimizer of zokern.
        ValueError: where several processes run, and the optimizer's ranks are not all of them; for a DDP wrapper that sends
            buffers round under parallel="directions".
        NotImplementedError: for what no integration can do yet (limits.py): fp16, engines.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
    if isinstance(optimizer, ForwardOnlyOptimizer):
        return accelerator.prepare_optimizer(optimizer)  # type: ignore[no-any-return]
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not isinstance(inner, ZerothOrderOptimizer):
        raise TypeError(
            f"optimizer must be one of zokern's, for example zokern.MeZO(model, lr=1e-6), got {type(inner).__name__}; "
            "others go to accelerator.prepare"
        )
    limits.refuse(
        "accelerate",
        precision=accelerator.mixed_precision,
        scaler=accelerator.scaler is not None,
        engine=accelerator.distributed_type.value,
        cut=limits.cut(accelerator.parallelism_config),
    )
    share = parts.of(inner._places(), accelerator.num_processes, "accelerate")
    if share.copies > 1:
        _refuse_wrapper(accelerator, inner)
    if finding.initialised():
        parts.unwrapped(accelerator, inner.module)
    if inner.module is not None:
        keep_codes(inner.module)
    made = ForwardOnlyOptimizer(inner, share, accelerator._schedulers)
    for known in [one for one in accelerator._optimizers if one.optimizer is inner]:
        _replace(accelerator._optimizers, known, made)
        for scheduler in accelerator._schedulers:
            _replace(scheduler.optimizers, known, made)
    accelerator.prepare_optimizer(made)
    return made


def prepare_loader(accelerator: Accelerator, optimizer: ForwardOnlyOptimizer, loader: Any) -> Any:
    """The DataLoader of the training, prepared: each process gets its part of the batches, and those that share the
    directions get the same. Without parallel="directions" it is `accelerator.prepare(loader)`, and so are the loaders of
    evaluations always, whose results `gather_for_metrics` puts together.

    Raises:
        TypeError: for an optimizer that `prepare` has not made.
        ValueError: where directions are shared, for dispatch_batches=True, which cuts batches up.
    """
    if not isinstance(optimizer, ForwardOnlyOptimizer):
        raise TypeError(
            f"optimizer must come from zokern.integrations.accelerate.prepare, got {type(optimizer).__name__}"
        )
    with parts.handing_out(accelerator, optimizer._parts):
        return accelerator.prepare(loader)


def _refuse_wrapper(accelerator: Accelerator, optimizer: ZerothOrderOptimizer) -> None:
    """
    Raises:
        ValueError: where the model has a DDP wrapper by now, in which processes with unequal numbers of forwards would wait
            for each other's buffers.
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in accelerator._models if optimizer._wrapper is None else ():
        if any(True for _ in model.buffers()) and any(id(p) in own for p in model.parameters()):
            raise ValueError(
                "parallel='directions': accelerator.prepare has put the model in DistributedDataParallel, which sends "
                "buffers round in each forward, and processes do unequal numbers of them. Call "
                "zokern.integrations.accelerate.prepare(accelerator, optimizer) before accelerator.prepare(model)"
            )


def _replace(these: list[Any], old: object, new: object) -> None:
    these[:] = [new if one is old else one for one in these]


class ForwardOnlyOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """accelerate's wrapper around a zokern optimizer, whose step takes micro-batches. `prepare` makes it.

    `metrics`, `counters`, `skipped_steps`, `flat_steps` and all else that is public are the optimizer's own; the optimizer
    itself is `optimizer`. A prepared scheduler moves once for each step that is made. `zero_grad()` does no harm.
    """

    _is_accelerate_prepared = True  # accelerator.prepare lets it be

    def __init__(
        self, optimizer: ZerothOrderOptimizer, share: parts.Parts = _ALONE, schedulers: Sequence[Any] = ()
    ) -> None:
        super().__init__(optimizer, device_placement=False)  # its states follow the parameters themselves
        self._parts, self._schedulers = share, schedulers
        self._begun = False  # a step has been made
        self._waiting = Waiting()
        weakref.finalize(self, self._waiting.tell, "when the optimizer was given up", _UNUSED)

    def step(
        self,
        closure: Callable[..., Any] | None = None,
        batch: Any = _MISSING,
        *,
        weight: float | None = None,
        reduction: str = "mean",
        loss_weights: Mapping[str, float] | None = None,
    ) -> Tensor | None:
        """Takes a micro-batch; with the last one of an accumulation, makes one step over all of them.

        The loss of a probe is sum_i w_i closure(batch_i) / sum_i w_i over the micro-batches i since the last step (or the
        sum alone). accelerate says which one is the last: every `gradient_accumulation_steps`-th, and the last of a
        prepared DataLoader. Without `accumulate()` each call is a step.

        Args:
            closure: called with a micro-batch, several times under torch.no_grad(); returns its loss. The last one is used
                for all of them.
            batch: what it is called with. It is kept as it is until the step. May be left out where nothing is
                accumulated: then the closure is called without an argument.
            weight: w_i, >= 0, for example the number of tokens; None means equal ones. For all micro-batches of a step, or
                for none.
            reduction: "mean" or "sum".
            loss_weights: where the closure returns several losses by name.

        Returns:
            The step's loss, 0-d, the mean over its forwards; None where the micro-batch waits for the others.

        Raises:
            TypeError, ValueError: for a closure or batch that is missing, and what the optimizer's own step refuses.
                Whatever is raised, also by the closure, this micro-batch counts as not given, and those before it wait on.
        """
        if closure is None:
            raise TypeError(_NO_CLOSURE)
        if batch is _MISSING:
            if self._waiting or not self.gradient_state.sync_gradients or self.gradient_state.num_steps > 1:
                raise TypeError(_NO_BATCH)
            if weight is not None or reduction != "mean":
                raise ValueError("weight and reduction are of a batch, and none is given; give it after the closure")
            if not self._begun:
                self._begin([])
            return self.optimizer.step(closure, loss_weights=loss_weights)  # type: ignore[no-any-return]
        if not callable(closure):
            raise TypeError(f"closure must be a function of a batch, got {type(closure).__name__}")
        options = {"reduction": reduction, "loss_weights": loss_weights}
        waiting = self._waiting.and_one(batch, weight, options)
        if not self.gradient_state.sync_gradients:
            self._waiting.become(waiting)
            return None
        if not self._begun:
            self._begin(waiting.batches)
        weights = waiting.weights or None
        loss = self.optimizer.step(closure, waiting.batches, batch_weights=weights, **options)
        self._waiting.become(Waiting())
        return loss  # type: ignore[no-any-return]

    def _begin(self, batches: list[Any]) -> None:
        """Before the first step: the others may have got here later."""
        if self._parts != _ALONE:
            self.optimizer.wait_for_ranks()
        if self._parts.copies > 1:
            parts.check_same(self._parts, batches, _LOADER)
            self._slow_down()
        self._begun = True

    def _slow_down(self) -> None:
        """A prepared scheduler moves as often in a step as there are processes, since each has its part of the data.

        Raises:
            ValueError: for a mesh of both kinds, where it would have to move another number of times.
        """
        for scheduler in (one for one in self._schedulers if self in one.optimizers):
            if self._parts.count > 1 and not scheduler.split_batches:
                raise ValueError(
                    "a prepared scheduler moves once for each process in a step, which is not right where some share the "
                    "directions: leave it out of accelerator.prepare, and call its step() where "
                    "accelerator.sync_gradients is True"
                )
            scheduler.split_batches = True

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's. Warns where micro-batches wait, which it does not have."""
        self._waiting.tell("when the state was saved", _UNSAVED)
        return super().state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a saved run. Micro-batches that wait belong to the run that is left: they are told and given up."""
        super().load_state_dict(state_dict)
        self._waiting.tell("when a state was loaded", _UNUSED)
        self._waiting.become(Waiting())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "optimizer":  # before it is made, as in a copy
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

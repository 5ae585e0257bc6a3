"""What has to be done at the places of the Trainer's loop."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from zokern._checks import ZokernWarning
from zokern.integrations import beginning, limits, shown

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "zokern.integrations.transformers needs transformers and accelerate; install zokern[trainer]"
    ) from error

_NO_OPTIMIZER = (
    "the checkpoint has no optimizer (save_only_model): the run goes on at step {}, and its schedule and the method's "
    "states begin anew, so that it may end with other weights than a run that was not broken off"
)
_LEFT_OUT = (
    "{} micro-batches at the end of an epoch are in no step, since the data ended within an accumulation; further ones are "
    "not told. A dataset that has a length makes a step of them; or lower gradient_accumulation_steps"
)


class End(TrainerCallback):  # type: ignore[misc]
    """trainer: a ForwardOnly. Comes before all other callbacks, so that they find the run's weights at its end."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_run()


class Hooks(TrainerCallback):  # type: ignore[misc]
    """trainer: a ForwardOnly."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        optimizer = trainer.zo_optimizer
        trainer.begin_books()
        trainer._begun = True
        trainer.begin_together()
        if state.is_world_process_zero:
            for told in beginning.told(trainer, optimizer, args, state):
                print(f"zokern: {told}", file=sys.stderr)
        limits.averages(trainer.callback_handler.callbacks, optimizer.options["fold_every"])
        limits.best(args.load_best_model_at_end, optimizer.options["fold_every"])
        shown.readers(trainer.callback_handler.callbacks, trainer.folded)
        if trainer.neftune_noise_alpha is not None and optimizer.paired_randomness == "auto":
            optimizer.paired_randomness = True  # its noise is no module's dropout
        if step and not optimizer.counters["steps"]:
            warnings.warn(_NO_OPTIMIZER.format(step), ZokernWarning, stacklevel=2)
            optimizer.resumed(step, 0)
            step = 0  # a journal of its own
        if trainer.journal and not state.is_hyper_param_search:
            trainer._journaled.begin(optimizer, args.output_dir, step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._apart = args.world_size > 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._micro = []  # of an epoch that was broken off
        self.trainer._stepped = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        left = len(self.trainer._micro)
        if left and not (control.should_epoch_stop or control.should_training_stop):
            self.trainer.notes.add("left", _LEFT_OUT.format(left))
            self.trainer.notes.tell()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer._stepped:
            raise RuntimeError(
                f"{type(self.trainer).__name__} has a training_step that never reaches ForwardOnly's, so no step was "
                "made; call super().training_step in it, or override compute_loss in its place"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._journaled.mark()
        self.trainer._apart = args.world_size > 1

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._apart = args.world_size > 1

"""`zokern finetune --check`: the run's own model, method and first batches, looked at before its first step."""

from __future__ import annotations

import functools

from rich.console import Console

from zokern.checking import Result
from zokern.checking import check as check_tensors
from zokern.finetune import models, surroundings
from zokern.finetune.batches import Order
from zokern.finetune.options import FinetuneError, Options
from zokern.finetune.run import line, load


def check(options: Options, console: Console | None = None) -> Result:
    """Loads what a run with these options would, and checks it on the batches of its first step. Nothing is written, so
    --output may be anything. Raises FinetuneError for what the user can mend.
    """
    console = console or Console()
    options.check_stored()
    with surroundings.kept():
        models.import_transformers()
        return _check(options, console)


def _check(options: Options, console: Console) -> Result:
    loaded = load(options, functools.partial(line, console))
    task, order = loaded.task, Order(len(loaded.task.sets["train"][1]), options.seed)
    draws = [order.draw(options.batch_size) for _ in range(options.accumulate)]
    batches = list(task.batches("train", draws))
    try:
        result = check_tensors(loaded.optimizer, task.aim, batches)
    except (TypeError, ValueError) as error:
        raise FinetuneError(str(error)) from error
    console.print()
    console.print(result)
    return result

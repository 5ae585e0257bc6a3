"""Runs of a Trainer whose updates wait (fold_every)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.integrations.tiny import arguments, equal, llama, rows, weights
from zokern import journal
from zokern.integrations.transformers import ZOTrainer
from zokern.journal import tools

WAITS: dict[str, Any] = {"eps": 1e-1, "distribution": "lowrank:1", "placement": "forward", "fold_every": 4, "seed": 3}


def trainer(folder: Path, model: Any = None, zo: Any = WAITS, cls: Any = ZOTrainer, **given: Any) -> Any:
    own = {name: given.pop(name) for name in ("journal", "callbacks") if name in given}
    args = arguments(folder, **{"weight_decay": 0.1, "learning_rate": 0.1, **given})
    return cls(model or llama(), args, train_dataset=rows(), eval_dataset=rows(4), zo=zo, **own)


def losses(run: Any, name: str = "eval_loss") -> torch.Tensor:
    return torch.tensor([line[name] for line in run.state.log_history if name in line])


def close(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """To what the rounding of a loss is in a step: 1e-6 of it, by eps, times lr and z. A step moves weights by 0.05."""
    return all(torch.allclose(x, y, rtol=0, atol=2e-5) for x, y in zip(weights(a), weights(b), strict=True))


def played(folder: Path, model: torch.nn.Module) -> int:
    """How many folds by hand the journal has, whose replay ends with the model's weights."""
    base = llama(next(model.parameters()).dtype)
    assert journal.replay(folder / "journal.zkj", base).verified
    assert equal(weights(base), weights(model))
    return int(tools.summary(folder / "journal.zkj")["folds"])

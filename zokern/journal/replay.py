"""Does a run's passes again on the weights that it started from: the same bits as training gave, without a forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from zokern._checks import ZokernWarning
from zokern.journal import sharded
from zokern.journal.fit import check, check_marks, has_hash, is_base
from zokern.journal.format import BROKEN_OFF, JournalError
from zokern.journal.player import Player, fresh_states
from zokern.journal.reader import DAMAGED, TORN, WHOLE, Reader
from zokern.placement import fsdp


class Replayed(int):
    """The number of steps done. verified: whether base and result are those of the training, by their hashes. state: of
    the journal (reader.py)."""

    verified: bool
    state: str


def named(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name; of a module, tied ones under their first name."""
    if not isinstance(model, nn.Module | Mapping):
        raise TypeError(
            f"model is a {type(model).__name__}; give a module, or tensors by name. A run of a list of parameters names "
            'them in order: {f"parameter {i}": p for i, p in enumerate(params)}'
        )
    if isinstance(model, nn.Module):
        fsdp.let_go(fsdp.modules_of(model))
        return dict(model.named_parameters())
    return dict(model)


@torch.no_grad()
def replay(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    *,
    until: int | None = None,
    verify: bool = True,
    fold: bool | None = None,
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> Replayed:
    """Makes the tuned weights of a journal's run out of those it started from, in place.

    Args:
        path: the journal.
        model: with the weights that the run started from, as a module or as tensors by name; on any device.
        until: how many of the run's steps to do; None for all, with a fold by hand (`opt.fold()`) after the last. The
            journal may be damaged after these.
        verify: compare the weights with the hashes in the journal, before the first step and after the last. A journal
            that has no hash of its last step is refused; with `until`, a ZokernWarning says that there is none.
        fold: add the updates too that wait after the last of these steps (fold_every), as `opt.fold()` would: the weights
            are those of the module's state_dict() there, and not p.data. The hashes are compared before. False leaves
            them out; None does too, with a ZokernWarning where any wait.
        backend: as for the optimizers; all give the same bits.
        progress: called with the number of steps done, after each.

    Returns:
        The number of steps done, with `verified` and the journal's `state`.

    Raises:
        JournalError: if the journal is damaged or malformed, the weights are not those it starts from, its result cannot be
            verified, or is not what training had. Weights are changed in the last case only.
    """
    params = named(model)
    with sharded.at_hand(Path(path), params.values()) as path:
        return _replay(path, params, until, verify, fold, backend, progress)


def _replay(
    path: Path,
    params: dict[str, Tensor],
    until: int | None,
    verify: bool,
    fold: bool | None,
    backend: str,
    progress: Callable[[int], None] | None,
) -> Replayed:
    reader = check(path, params, until)
    wanted = _expected(reader, params, until) if verify else None
    player = Player(Reader(path), params, fresh_states(reader.header), backend)
    done = int(reader.header["first_step"])
    for step in player.reader.steps() if until is None or until > done else ():
        player.play(step)
        if not step.flags & BROKEN_OFF:
            done = step.number + 1
        if progress is not None:
            progress(done)
        if done == until:  # what follows may be damaged, or a fold
            break
    player.flush()
    if wanted is not None and not has_hash(params, wanted, player.reader, reader):
        raise JournalError(f"{path}: the weights after {done} steps are not those that training had")
    if fold:
        player.fold()
    elif fold is None and player.pending.steps:
        warnings.warn(
            f"{path}: updates that wait there (fold_every; the last {player.pending.steps} of {done} steps) are not in the "
            "weights now; give fold=True for those of the module's state_dict(), or fold=False for p.data",
            ZokernWarning,
            stacklevel=4,
        )
    replayed = Replayed(done)
    replayed.verified, replayed.state = wanted is not None, reader.state
    return replayed


def _expected(reader: Reader, params: Mapping[str, Tensor], until: int | None) -> str | None:
    """The hash that the weights must have in the end. None, with a warning, if there is none of `until`."""
    check_marks(reader)
    if not is_base(reader, params):
        raise JournalError(
            f"{reader.path}: the weights given are not those that the run started from; give its base model. What the "
            "script drew itself, an adapter's weights or a new head's, has to be the same: draw it with the same seed"
        )
    if until is None:
        if reader.state != WHOLE:
            raise JournalError(
                f"{reader.path}: {reader.explain()}. So the result cannot be verified: take another copy, or go on with "
                f"the run; what is there, {reader.done} steps, is replayed with verify=False (--no-verify)"
            )
        return reader.marks[-1].hash
    found = [mark.hash for mark in reader.marks if mark.done == until and not (mark.broken_off or mark.folded)]
    if not found:
        after = f"; {reader.explain()}" if reader.state in (TORN, DAMAGED) else ""
        warnings.warn(
            f"{reader.path}: not verified, as the journal has no hash of the weights after step {until}{after}",
            ZokernWarning,
            stacklevel=5,
        )
    return found[-1] if found else None

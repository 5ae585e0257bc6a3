"""Journals of runs whose updates wait: begun, written on and compared where something else was done than steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import small
from tests.placement.test_folding import built, given_losses, run, same_bits, saved, weights_of
from zokern import journal
from zokern.journal import tools


def test_a_journal_is_written_on_with_folded_copies_and_not_where_other_updates_wait(tmp_path: Path) -> None:
    path = tmp_path / "a"
    model = small()
    opt = built(model)
    with journal.write(opt, path):
        run(model, opt, 0, 6)
        state, weights, folded = saved(opt), weights_of(model), model.state_dict()
        run(model, opt, 6, 7)
    content = path.read_bytes()
    twin = small()
    other = built(twin)
    other.load_state_dict(state)
    twin.load_state_dict(weights, strict=False)
    other.fold()  # which the journal was not told of
    with (
        pytest.raises(journal.JournalError, match="updates of 2 steps wait there, and of 0 in"),
        journal.append(other, path),
    ):
        pass
    assert path.read_bytes() == content
    other.load_state_dict(state)
    twin.load_state_dict(folded)
    with journal.write(other, tmp_path / "b"):  # nothing waits for these
        pass
    (tmp_path / "c").write_bytes(content)
    with journal.append(other, tmp_path / "c"):  # which gets a record of the fold that they have
        run(twin, other, 6, 9)
    base = small()
    assert journal.replay(tmp_path / "c", base, fold=False).verified
    assert same_bits(weights_of(base), weights_of(twin))
    other.load_state_dict(state)
    twin.load_state_dict(weights, strict=False)
    with journal.append(other, path):
        run(twin, other, 6, 9)
    base = small()
    assert journal.replay(path, base, fold=False).verified
    assert same_bits(weights_of(base), weights_of(twin))


def test_a_journal_has_a_fold_after_which_something_was_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = small(), small()
    opt = built(model)
    with journal.write(opt, tmp_path / "a"):
        run(model, opt, 0, 3)
        once = opt._passes.run

        def broken(*args: Any, **named: Any) -> None:
            once(*args, **named)
            raise MemoryError

        monkeypatch.setattr(opt._passes, "run", broken)
        with pytest.raises(MemoryError):
            opt.fold()
        monkeypatch.undo()
        assert opt.pending == 0
        run(model, opt, 3, 6)
    assert journal.replay(tmp_path / "a", base, fold=False).verified
    assert same_bits(weights_of(base), weights_of(model))


def test_two_journals_differ_in_a_fold(tmp_path: Path) -> None:
    for name, folds in (("a", ()), ("b", (1,)), ("c", (2,))):
        model = small()
        opt = built(model)
        with journal.write(opt, tmp_path / name):
            for t in range(3):
                given_losses(model, opt, t)
                if t in folds:
                    opt.fold()
    a, b, c = (tmp_path / name for name in "abc")
    assert tools.first_difference(a, b) == "after step 1, where only one of them was folded by hand"
    assert tools.first_difference(b, a) == "after step 1, where only one of them was folded by hand"
    assert tools.first_difference(a, c) == f"after step 2, after which only {c} was folded by hand"
    assert tools.first_difference(c, c) is None

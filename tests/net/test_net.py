"""The net (tests/net): stored runs are done again, and stored journals replayed, to the same bits."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from tests.net import cases, store
from tests.net.model import Whole
from tests.net.runs import content, do
from zokern import journal
from zokern.optim import METHODS

CASES = cases.every()
# The mean of ES's standardised rewards is nought but for the order in which torch adds up, another one on Arm.
ROUNDED = {"es"} if platform.machine() not in ("x86_64", "AMD64") else set[str]()


def of(method: str) -> list[cases.Case]:
    return [case for case in CASES if case.method == method]


def test_every_method_is_in_the_net() -> None:
    assert {method for method, _ in cases.METHODS.values()} == set(METHODS.values())


def test_every_case_is_stored_and_nothing_else() -> None:
    names = {str(case) for case in CASES}
    assert len(names) == len(CASES)
    assert set(store.hashes()) == names
    assert set(store.files()) == {f"{case}.{'pt' if case.what == 'saved' else 'zkj'}" for case in CASES}


def test_the_runs_differ() -> None:
    """Each setting has changed some bit: the net would not hold what it does not see."""
    for dtype in cases.DTYPES:
        found = [(case, store.hashes()[str(case)]) for case in CASES if case.dtype == dtype]
        (base,) = {one["base"] for _, one in found}
        assert base not in {one["weights"] for _, one in found}
        plain = [
            one["weights"]
            for case, one in found
            if case.what == "plain" and case.placement == "shadow" and case.rounding != "stochastic"
        ]
        assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("method", cases.ALL)
def test_runs_give_the_stored_bits(method: str, tmp_path: Path) -> None:
    unlike = []
    for case in of(method):
        path, wanted = tmp_path / f"{case}.zkj", tmp_path / "stored.zkj"
        stored = store.files()[f"{case}.{'pt' if case.what == 'saved' else 'zkj'}"]
        found = do(case, path, stored if case.what == "saved" else None)
        found.pop("saved", None)
        expected = dict(store.hashes()[str(case)])
        if method in ROUNDED:
            del found["figures"], expected["figures"]
        same = found == expected
        if case.what != "saved":
            wanted.write_bytes(stored)
            same = same and list(content(path)) == list(content(wanted))
        if not same:
            unlike.append(str(case))
    assert unlike == []


@pytest.mark.parametrize("method", cases.ALL)
def test_stored_journals_replay_to_the_stored_weights(method: str, tmp_path: Path) -> None:
    unlike = []
    for case in of(method):
        if case.what != "saved":
            path, model = tmp_path / f"{case}.zkj", Whole(cases.DTYPES[case.dtype])
            path.write_bytes(store.files()[path.name])
            journal.replay(path, model, fold=False)
            if journal.hash_of(model.named_parameters()) != store.hashes()[str(case)]["weights"]:
                unlike.append(str(case))
    assert unlike == []


def test_the_net_notices_another_base(tmp_path: Path) -> None:
    case = of("mezo")[0]
    path, model = tmp_path / "run.zkj", Whole(torch.float32)
    path.write_bytes(store.files()[f"{case}.zkj"])
    with torch.no_grad():
        model.embedding.view(torch.int32)[0, 0] ^= 1 << 12
    with pytest.raises(journal.JournalError, match="not those that the run started from"):
        journal.replay(path, model)
    journal.replay(path, model, verify=False)
    assert journal.hash_of(model.named_parameters()) != store.hashes()[str(case)]["weights"]

"""A journal from a stranger can never touch memory: it is refused, by its name, or does what it says on its own tensors."""

from __future__ import annotations

import json
import random
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fuzz import corpus, keep, kept, records, targets
from zokern import journal, sweep
from zokern.contract.rules import RULES
from zokern.journal import checks
from zokern.journal import format as journal_format
from zokern.passes.operands import Operands
from zokern.passes.spec import AXPY, PassNumbers

STORED = corpus.stored()
INPUTS, SECONDS = 400, 20.0


def test_the_corpus_has_every_case() -> None:
    assert set(STORED) == set(targets.CASES)


@pytest.mark.parametrize("name", STORED)
def test_stored_journals_go_on_replaying(name: str, tmp_path: Path) -> None:
    """Of format 2, with the hash that their run had; and what is fuzzed does all of its work on them."""
    assert journal.replay(STORED[name], targets.tensors(journal.Reader(STORED[name]).header), fold=False).verified
    path = tmp_path / "run.zkj"
    path.write_bytes(STORED[name].read_bytes())
    ends = targets.all_of(path, STORED)
    assert list(ends) == list(targets.NAMES)
    assert not any(end.refused for end in ends.values())
    assert path.read_bytes() == STORED[name].read_bytes()
    assert targets.case_of(journal.Reader(path).header) == name


@pytest.mark.parametrize("name", STORED)
def test_taking_apart_and_putting_together_gives_the_file(name: str) -> None:
    data = STORED[name].read_bytes()
    assert records.repaired(data) == data
    assert records.changed(data, random.Random(1)) != data


# ------------------------------------------------------------------------------------------------- what was found and kept


def test_kept_inputs_end_as_they_did(tmp_path: Path) -> None:
    """What was done on them is done, with the same weights, and what was refused is, for the same reason.

    Where a message has got other words on purpose: python -m tests.fuzz.keep.
    """
    path, ends, files = tmp_path / "run.zkj", kept.ends(), kept.stored()
    assert list(files) == [kept.name_of(data) for data in files.values()]
    assert set(ends) == set(files)
    for name, data in files.items():
        path.write_bytes(data)
        assert targets.outline(targets.all_of(path, STORED)) == ends[name], name
        assert path.read_bytes() == data


def test_what_is_kept_is_stored_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, ends = dict(kept.stored()), kept.ends()
    before = {name: (kept.DATA / name).read_bytes() for name in ("fuzz.tar.xz", "fuzz.json")}
    monkeypatch.setattr(kept, "DATA", tmp_path)
    kept.store(sorted(files.values(), reverse=True), dict(sorted(ends.items(), reverse=True)))
    assert (tmp_path / "fuzz.json").read_bytes() == before["fuzz.json"]
    with tarfile.open(tmp_path / "fuzz.tar.xz") as archive:
        assert archive.getnames() == list(files)


class Letters:
    """Reaches what letters the input has."""

    def at(self, data: bytes) -> frozenset[str]:
        return frozenset(data.decode())


@pytest.mark.parametrize(
    ("inputs", "known", "wanted"),
    [
        (["a", "ab"], "", {"ab": "ab"}),  # the first one reaches nothing that the other does not
        (["a", "ab", "bc"], "", {"a": "a", "bc": "bc"}),  # the longest one goes first
        (["a", "b"], "a", {"b": "b"}),
        (["ab", "ab", "ba"], "", {"ab": "ab"}),
        (["a", "b"], "ab", {}),
        (["ab", "ac", "bd"], "", {"ac": "ac", "bd": "bd"}),
        (["abx", "aby"], "", {"abx": "abx", "aby": "y"}),  # what both reach is not lost where both are made smaller
    ],
)
def test_inputs_are_kept_that_each_reach_what_no_other_one_does(
    inputs: list[str], known: str, wanted: dict[str, str]
) -> None:
    look: Any = Letters()
    found = keep.needed([one.encode() for one in inputs], look, frozenset(known))
    assert {data.decode(): "".join(sorted(own)) for data, own in found.items()} == wanted  # type: ignore[arg-type]


def test_an_input_is_made_as_small_as_it_can_be() -> None:
    """Records, entries and bytes that what is wanted does not need are gone."""

    class Rows:
        def at(self, data: bytes) -> frozenset[str]:
            header, bodies, _ = records.take_apart(data)
            whole = data == records.build(header, bodies)
            said = header + b"".join(bodies)
            return frozenset(word for word in ("first_step", "rows") if whole and word.encode() in said)

    look: Any = Rows()
    data = STORED["adam"].read_bytes()
    small = keep.smaller(data, look, frozenset(["first_step"]))
    header, bodies, version = records.take_apart(small)
    assert (json.loads(header).keys(), bodies, version) == ({"first_step"}, [], journal_format.VERSION)
    small = keep.smaller(data, look, frozenset(["first_step", "rows"]))
    header, bodies, _ = records.take_apart(small)
    assert (json.loads(header).keys(), len(bodies)) == ({"first_step"}, 1)
    assert len(small) < 80
    assert keep.smaller(small, look, frozenset(["first_step", "rows"])) == small


def test_what_is_reached_is_lines_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.zkj"
    look = keep.Looking(path)
    good, bad = look.at(STORED["plain"].read_bytes()), look.at(b"zkjrnl")
    assert ("show", "") in good
    assert ("show", ": not a zokern journal, or its header was cut off; give the file that the optimizer wrote") in bad
    assert any(isinstance(one, tuple) and one[0] == "journal/player.py" for one in good)
    assert not any(isinstance(one, tuple) and one[0] == "journal/player.py" for one in bad)
    assert look.at(STORED["plain"].read_bytes()) == good
    assert targets.masked("'a' is [3, {'b': 1}] there, -2.5e-3 here") == "'' is [] there, # here"


# ------------------------------------------------------------------------------------------------------ changed at random


def test_an_optimizer_may_refuse_weights_that_a_file_has_left_too_small() -> None:
    """For its eps, in their dtype; every other error of a step is a fault."""

    def weights(run: targets.Run) -> list[torch.Tensor]:
        return [p.detach().clone() for p in run.params.values()]

    def angry() -> torch.Tensor:
        raise ValueError("what is this?")

    run = targets.begin(targets.CASES["plain"])
    before = weights(run)
    targets.step(run)
    assert not any(map(torch.equal, weights(run), before))
    with pytest.raises(ValueError, match=r"^what is this\?$"):
        targets.step(run._replace(loss=angry))
    run = targets.begin(targets.CASES["plain"])
    with torch.no_grad():
        for p in run.params.values():
            p.mul_(1e-6)
    before = weights(run)
    targets.step(run)
    assert all(map(torch.equal, weights(run), before))


def test_changed_journals_are_refused_or_do_what_they_say(tmp_path: Path) -> None:
    """`make fuzz` does this with coverage and sanitizers, a million times."""
    rng, path, refused, did = random.Random(20261128), tmp_path / "run.zkj", 0, 0
    files, begun, tried = [path.read_bytes() for path in STORED.values()], time.monotonic(), 0
    while tried < INPUTS and (tried < 50 or time.monotonic() - begun < SECONDS):
        path.write_bytes(records.changed(rng.choice(files), rng))
        end = targets.all_of(path, STORED)["replay"]
        refused += bool(end.refused)
        did += not end.refused
        tried += 1
    assert min(refused, did) > tried / 10


# ------------------------------------------------------------------------------------------- made by hand, one by one


def journal_with(path: Path, states: Any, layout: Any, signature: Any) -> None:
    """A journal of one step, with right checksums."""
    header = {**journal.Reader(STORED["plain"]).header, "states": states}
    with path.open("wb", buffering=0) as file:
        out = journal_format.start(file, header)
        out.append_json(journal_format.LAYOUT, layout)
        out.append_json(journal_format.SIGNATURE, signature)
        numbers = min(signature["numbers"], 1 << 10)
        ones = journal_format.np.ones(numbers, journal_format.np.float32)
        out.append(journal_format.encode_step(0, 0, ones, 0 * ones))


def layout_of(*entries: tuple[str, list[int], int]) -> dict[str, Any]:
    return {"params": [[i, name, shape, "float32", group, None, None] for i, (name, shape, group) in enumerate(entries)],
            "layers": None}  # fmt: skip


def signature_of(rule: str, rows: int, numbers: int, groups: int = 1) -> dict[str, Any]:
    one = {"rule": rule, "seeds": [[0, 0]], "rows": rows}
    return {"passes": [one], "memory": 0, "groups": groups, "numbers": numbers}


def with_pass(**changes: Any) -> dict[str, Any]:
    """The signature of one plain pass, with these entries in the pass."""
    signature = signature_of("axpy", 1, 4)
    signature["passes"][0].update(changes)
    return signature


W = ("w", [4097], 0)
PLAIN = signature_of("axpy", 1, 4)
SAME_ID = {"params": [[0, name, [3], "float32", 0, None, None] for name in ("w", "u")], "layers": None}
LAST_BLOCK = {"params": [[0, "w", [4097], "float32", 0, None, 2]], "layers": [1, 2]}


@pytest.mark.parametrize(
    ("states", "layout", "signature", "word"),
    [
        ({"m": ["bfloat16", 0.0]}, layout_of(W), signature_of("momentum", 1, 7), "state 'm' is 'bfloat16'.*float32"),
        ({"m": ["float32", 0.0]}, layout_of(W), signature_of("axpy", 0, 2), "rows is no whole number from 1"),
        ({}, layout_of(("w", [4097], 0), ("u", [3], 1)), signature_of("axpy", 1, 5, 2), "1 rows.*have 2"),
        ({}, layout_of(W), signature_of("axpy", 5, 12), "5 rows.*have 1"),
        ({}, layout_of(W), signature_of("momentum", 1, 7), "momentum needs the state 'm', which is missing"),
        ({"h": ["bfloat16", 1.0], "m": ["float32", 0.0]}, layout_of(W), signature_of("helene", 1, 12), "'h', which is bf"),
        ({"m": ["save", 0.0]}, layout_of(W), signature_of("momentum", 1, 7), "state 'm' is 'save'"),
        ({"x": ["float32", 0.0]}, layout_of(W), signature_of("axpy", 1, 4), "a state is called 'x'"),
        ({}, layout_of(("w", [4097], 7)), signature_of("axpy", 1, 4), "1 groups.*of 8"),
        ({}, layout_of(W, W), signature_of("axpy", 1, 4), "one name"),
        ({}, layout_of(("w", [1 << 40, 1 << 40], 0)), signature_of("axpy", 1, 4), "number of elements"),
        ({}, layout_of(("w", ["4097"], 0)), signature_of("axpy", 1, 4), "a size is no whole number"),
        ({}, layout_of(W), signature_of("axpy", 1, 5), "numbers is 5, and its passes have 4"),
        ({}, layout_of(W), signature_of("axpy", 1 << 40, 4), "rows is no whole number"),
        ({}, SAME_ID, PLAIN, "one tensor id"),
        ({}, LAST_BLOCK, PLAIN, "block is no whole number from 0 to 1"),
        ({}, layout_of(W), with_pass(stochastic=True), "stochastic without a seed"),
        ({}, layout_of(W), with_pass(rows=True), "rows is no whole number"),
        ({}, layout_of(W), with_pass(seeds=[[6, 0]]), "a direction from before the run"),
        ({}, layout_of(W), with_pass(keep_second=True), "axpy knows no such flag"),
        ({}, layout_of(W), with_pass(colour=1), "'colour', which this zokern does not know; install a new"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_pass(
    states: Any, layout: Any, signature: Any, word: str, tmp_path: Path
) -> None:
    path, w = tmp_path / "evil.zkj", {"w": torch.zeros(4097), "u": torch.zeros(3)}
    journal_with(path, states, layout, signature)
    for until in (None, 1):  # in the last step that is wanted, too
        with pytest.raises(journal.JournalError, match=word):
            journal.replay(path, w, until=until, verify=False)
    assert not any(t.any() for t in w.values())


def test_a_state_may_begin_with_a_whole_number_of_any_size(tmp_path: Path) -> None:
    """JSON has no other kind of number: what a float32 can hold is one, also beyond 64 bits."""
    path, found = tmp_path / "run.zkj", []
    for initial in (10**30, 1e30):
        w = torch.ones(4097)
        journal_with(path, {"m": ["float32", initial]}, layout_of(W), signature_of("momentum", 1, 7))
        assert journal.replay(path, {"w": w}, verify=False) == 1
        found.append(w)
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.ones(4097))


def test_each_state_of_the_methods_is_one_that_a_journal_may_have() -> None:
    """The checks' table comes from the rules; a method whose states it refuses could write no journal."""
    for rule in RULES.values():
        for name in rule.states:
            assert set(checks._STATES[name]) >= set(rule.state_dtypes)


# ----------------------------------------------------------------------------------------- and once more at the launch


@pytest.mark.parametrize(
    ("rule", "coefs", "shared", "state", "word"),
    [
        ("axpy", (0, 1, 1), (0, 1), None, "numbers for 0 rows, and its tensors are of 2"),
        ("axpy", (1, 1, 1), (1, 1), None, "numbers for 1 rows, and its tensors are of 2"),
        ("axpy", (2, 1, 2), (2, 1), None, r"1 seeds has coefs \(2, 1, 2\)"),
        ("axpy", (2, 2, 1), (2, 1), None, r"needs \[rows, 1, seeds\]"),
        ("axpy", (2, 1, 1), (3, 1), None, r"scalars \(3, 1\)"),
        ("momentum", (2, 2, 1), (2, 3), torch.bfloat16, "momentum has states of torch.bfloat16; it keeps them in float32"),
        ("hizoo", (2, 2, 1), (2, 2), torch.float16, "keeps them in float32 or bfloat16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chain", [False, True])
def test_a_launch_refuses_numbers_that_are_not_there(
    rule: str, coefs: tuple[int, ...], shared: tuple[int, ...], state: Any, word: str, chain: bool
) -> None:
    tensors = [torch.zeros(40), torch.zeros(8)]
    states = [] if state is None else [[torch.zeros(t.shape, dtype=state) for t in tensors]]
    operands = Operands(tensors, None, states, [0, 1], [0, 0], [0, 1])
    spec, rounding = replace(AXPY, rule=RULES[rule]), torch.tensor([1, 2])
    numbers = PassNumbers(torch.tensor([5]), torch.zeros(coefs), torch.zeros(shared), rounding)
    launch = partial(sweep.run_chain, operands, [(spec, numbers)], RULES[rule])
    with pytest.raises(ValueError, match=word):
        launch() if chain else sweep.run(operands, spec, numbers)
    assert not any(t.any() for t in tensors)


def test_states_of_two_dtypes_are_refused_at_the_launch() -> None:
    """A table has one dtype for all states: the second would be read as the first is stored."""
    w = [torch.zeros(40)]
    states = [[torch.zeros(40)], [torch.zeros(40, dtype=torch.bfloat16)]]
    operands = Operands(w, None, states, [0], [0], [0])
    numbers = PassNumbers(torch.tensor([5]), torch.zeros(1, 3, 1), torch.zeros(1, 7))
    with pytest.raises(ValueError, match=r"a state is .*bfloat16"):
        sweep.run(operands, replace(AXPY, rule=RULES["helene"]), numbers)


def test_files_that_take_much_memory_to_read_are_refused(tmp_path: Path) -> None:
    """JSON of small objects is 30 times as large in memory as in the file."""
    header = {**journal.Reader(STORED["plain"]).header, "about": {"x": [{} for _ in range(3_000_000)]}}
    path = tmp_path / "run.zkj"
    with pytest.raises(journal.JournalError, match="make `about` shorter"), path.open("wb", buffering=0) as file:
        journal_format.start(file, header)
    text = b'{"x":[' + b"{}," * 3_000_000 + b"{}]}"
    path.write_bytes(records.build(text, []))
    with pytest.raises(journal.JournalError, match="claims"):
        journal.Reader(path)
    good, bodies, _ = records.take_apart(STORED["plain"].read_bytes())
    path.write_bytes(records.build(good, [bodies[0][:1] + text]))
    with pytest.raises(journal.JournalError, match="more than"):
        list(journal.Reader(path).steps())

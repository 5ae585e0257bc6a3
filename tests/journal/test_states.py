"""The four states of a journal, and what replay, resume, show and diff make of each: nothing lost, nothing believed."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.fuzz import records
from tests.journal.test_journal import Toy, command, read_all, same, weights, written
from tests.models import toy
from tests.net import store
from tests.net.cases import every
from tests.net.runs import optimizer_of, steps
from zokern import journal
from zokern.journal import format as journal_format
from zokern.journal import reader as journal_reader
from zokern.journal.search import good_record


def state_of(path: Path) -> str:
    reader = journal.Reader(path)
    try:
        for _ in reader.steps():
            pass
    except journal.JournalError:
        assert reader.state == "damaged"
    return reader.state


def garbage(size: int) -> bytes:
    return random.Random(size).randbytes(size)


TAILS = {
    "zeros": bytes(100),
    "a page of zeros": bytes(4096),
    "garbage": garbage(300),
    "much garbage": garbage(200_000),
    "part of a record": b"\x20\x03abc",
    "a length beyond 32 bits": b"\xff\xff\xff\xff\xff\xff",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_what_is_no_record_after_the_last_one_is_torn(tail, tmp_path):
    """A power cut leaves zeros or garbage: every step is there, the run goes on, and what is cut off is kept."""
    path, base, model = written(tmp_path)
    whole = read_all(path)[0]
    with path.open("ab") as file:
        file.write(tail)
    assert state_of(path) == "torn"
    assert read_all(path)[0] == whole
    with pytest.raises(journal.JournalError, match=rf"{len(tail)} bytes after step 6 .*--no-verify"):
        journal.replay(path, copy.deepcopy(base))
    again = copy.deepcopy(base)
    done = journal.replay(path, again, verify=False)
    assert (done, done.verified, done.state) == (6, False, "torn")
    assert same(weights(again), weights(model))
    optimizer = zokern.MeZO(again := copy.deepcopy(base), 1e-2)
    with (
        pytest.warns(zokern.ZokernWarning, match=r"kept as run\.zkj\.cut"),
        journal.resume(optimizer, path) as done,
    ):
        assert done == 6
    assert (tmp_path / "run.zkj.cut").read_bytes() == tail
    assert state_of(path) == "whole"
    assert journal.replay(path, copy.deepcopy(base)).verified
    assert same(weights(again), weights(model))


def test_copies_of_what_is_cut_off_do_not_replace_each_other(tmp_path):
    path, base, _ = written(tmp_path)
    for i, tail in enumerate((b"\x00one", b"\x00two")):
        with path.open("ab") as file:
            file.write(tail)
        optimizer = zokern.MeZO(copy.deepcopy(base), 1e-2)
        with pytest.warns(zokern.ZokernWarning), journal.resume(optimizer, path):
            pass
        assert (tmp_path / f"run.zkj.cut{i or ''}").read_bytes() == tail


@pytest.mark.parametrize(
    "bad", [bytes(40), garbage(40), garbage(41), b""], ids=["zeros", "garbage", "more", "left out"]
)
def test_bytes_that_are_no_record_between_good_ones_are_damage(bad, tmp_path):
    """Also where they are more or fewer than were there: later records are found by themselves."""
    path, base, _ = written(tmp_path, 8)
    data, reader, ends = path.read_bytes(), journal.Reader(path), []
    for _ in reader.steps():
        ends.append(reader.end)
    path.write_bytes(data[: ends[3]] + bad + data[ends[5] :])
    assert state_of(path) == "damaged"
    before = weights(base)
    with pytest.raises(journal.JournalError, match=r"damaged at byte \d+, after step 4.*--until"):
        journal.replay(path, base)
    optimizer = zokern.MeZO(base, 1e-2)
    with pytest.raises(journal.JournalError, match="damaged"), journal.resume(optimizer, path):
        pass
    assert same(weights(base), before)
    assert optimizer.counters["steps"] == 0
    with pytest.warns(zokern.ZokernWarning, match=r"no hash of the weights after step 4; it is damaged at byte"):
        assert journal.replay(path, base, until=4) == 4  # as the message says
    with pytest.raises(journal.JournalError, match="after step 4"):
        journal.replay(path, base, until=5)


def test_the_last_record_changed_is_told_kept_and_not_verified(tmp_path):
    """It cannot be told from a torn one. The steps before it are all there."""
    path, base, model = written(tmp_path)
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    assert state_of(path) == "torn"
    with pytest.raises(journal.JournalError, match=r"cut off or changed at its end.*cannot be verified"):
        journal.replay(path, copy.deepcopy(base))
    size = len(data) - journal.Reader(path).size
    assert size == 0
    again = copy.deepcopy(base)
    with pytest.warns(zokern.ZokernWarning, match="kept as"), journal.resume(zokern.MeZO(again, 1e-2), path):
        pass
    assert data.endswith((tmp_path / "run.zkj.cut").read_bytes())
    assert same(weights(again), weights(model))


def test_a_good_record_is_found_at_any_place():
    """By the checksum before it, after anything; in both formats; and nothing is found in garbage or zeros."""
    for version in (1, 2):
        body = bytes([journal_format.STEP, 0, 1]) + b"\0\0\x80?"
        previous = 0x12345678.to_bytes(4, "little")
        head = journal_format.varint(len(body))
        crc = journal_format.checksum(version, head, body, 0x12345678).to_bytes(4, "little")
        for before in (1, 2, 57, 3000):
            noise = garbage(before)
            found = good_record(version, bytes(4) + noise + previous + head + body + crc + garbage(30))
            assert found == 4 + before + 4
    for size in (0, 1, 5, 1000, 3_000_000):
        assert good_record(2, bytes(size)) is None
        assert good_record(2, garbage(size)) is None


# ------------------------------------------------------------------------------------------------------- verification


def test_a_journal_without_a_hash_of_its_end_is_not_verified_in_silence(tmp_path):
    """A copy that ends where a record does. --until is verified where a mark allows it."""
    path, base, model = written(tmp_path, 5)
    data, reader, ends = path.read_bytes(), journal.Reader(path), []
    for _ in reader.steps():
        ends.append(reader.end)
    path.write_bytes(data[: ends[2]])
    assert state_of(path) == "unverified"
    with pytest.raises(
        journal.JournalError, match=r"no hash of the weights after step 3.*incomplete.*cannot be verified"
    ):
        journal.replay(path, copy.deepcopy(base))
    path.write_bytes(data)
    again = copy.deepcopy(base)
    with pytest.warns(zokern.ZokernWarning, match="not verified.*after step 3"):
        assert not journal.replay(path, again, until=3).verified
    assert journal.replay(path, again := copy.deepcopy(base), until=5).verified
    assert same(weights(again), weights(model))
    with torch.no_grad():
        again = copy.deepcopy(base)
        again.norm.bias[0] += 1.0
    with pytest.raises(journal.JournalError, match="not those that the run started from"):
        journal.replay(path, again, until=3)


def test_until_is_verified_in_the_middle_where_a_run_was_taken_up(tmp_path):
    path, base, _ = written(tmp_path, 3)
    middle = copy.deepcopy(base)
    with journal.resume(zokern.MeZO(middle, 1e-2), path) as done:
        assert done == 3
    optimizer = zokern.MeZO(again := copy.deepcopy(base), 1e-2)
    with journal.resume(optimizer, path):
        optimizer.step(again)
    found = copy.deepcopy(base)
    assert journal.replay(path, found, until=3).verified
    assert same(weights(found), weights(middle))
    assert journal.replay(path, found := copy.deepcopy(base)) == 4
    assert same(weights(found), weights(again))


def test_resume_looks_at_the_hash(tmp_path):
    """Weights that something else changed between two steps are not those of a replay."""
    model, path = toy(), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), zokern.MeZO(model, 1e-2)
    with journal.write(optimizer, path):
        optimizer.step(model)
        with torch.no_grad():
            model.norm.bias.mul_(1.5).add_(0.1)
        optimizer.step(model)
    before = path.read_bytes()
    with (
        pytest.raises(journal.JournalError, match="after 2 steps are not those that training had"),
        journal.resume(zokern.MeZO(base, 1e-2), path),
    ):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("said", [0, 3])
def test_a_hash_of_another_number_of_steps_is_refused(said, tmp_path):
    """The optimizer's counter was set inside the journal: its noise is of other steps than the journal says."""
    model, path = toy(), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), zokern.MeZO(model, 1e-2)
    with journal.write(optimizer, path):
        optimizer.step(model)
        optimizer._passes.counters.steps = said  # what load_state_dict did before it was refused there
    before = weights(base)
    with pytest.raises(journal.JournalError, match=rf"after {said} steps, where it has 1.*load_state_dict"):
        journal.replay(path, base)
    assert state_of(path) == "unverified"
    with pytest.raises(journal.JournalError, match="where it has 1"), journal.resume(zokern.MeZO(base, 1e-2), path):
        pass
    assert same(weights(base), before)


def test_a_step_after_a_hash_is_not_verified_by_it(tmp_path):
    """A run that was taken up and killed: the hash in its journal is of the steps before."""
    path, base, _ = written(tmp_path, 2)
    model = copy.deepcopy(base)
    optimizer = zokern.MeZO(model, 1e-2)
    with journal.resume(optimizer, path):
        optimizer.step(model)
        killed = path.read_bytes()
    path.write_bytes(killed)
    assert state_of(path) == "unverified"
    with pytest.raises(journal.JournalError, match="no hash of the weights after step 3"):
        journal.replay(path, base)


def test_a_step_that_broke_off_before_the_hash(tmp_path):
    """A replay does its passes, and is verified; a run that is taken up leaves them out, as its weights are new."""
    model, path = toy(torch.float16), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), zokern.MeZO(model, 1e-2, placement="inplace")
    with journal.write(optimizer, path):
        optimizer.step(model)
        clean = weights(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(interrupted)
    assert not same(weights(model), clean)  # restored to the rounding of 16 bits
    assert journal.replay(path, again := copy.deepcopy(base)).verified
    assert same(weights(again), weights(model))
    with pytest.warns(zokern.ZokernWarning, match="not verified"):
        assert not journal.replay(path, again := copy.deepcopy(base), until=1).verified
    assert same(weights(again), clean)
    with journal.resume(zokern.MeZO(again := copy.deepcopy(base), 1e-2, placement="inplace"), path) as done:
        assert done == 1
        assert same(weights(again), clean)
    assert (tmp_path / "run.zkj.cut").exists()


def interrupted() -> torch.Tensor:
    raise KeyboardInterrupt


def test_a_checksum_alone_that_is_changed_is_damage(tmp_path):
    """Also the last step's, with only the hash behind it."""
    path, _, _ = written(tmp_path, 3)
    data, reader = bytearray(path.read_bytes()), journal.Reader(path)
    for _ in reader.steps():
        end = reader.end
    data[end - 1] ^= 1
    path.write_bytes(data)
    assert state_of(path) == "damaged"


def test_all_signatures_together_are_bounded(tmp_path, monkeypatch):
    path, _, _ = written(tmp_path, 1)
    monkeypatch.setattr(journal_reader, "MAX_NUMBERS", 3)
    with pytest.raises(journal.JournalError, match="more than 3 numbers"):
        list(journal.Reader(path).steps())


@pytest.mark.parametrize("update", ["sgd", "adam", "adamezo"])
def test_groups_that_come_later_are_in_the_journal(update, tmp_path):
    """A list of parameters: the base's hash is of those that were there."""
    model, path = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)), tmp_path / "a.zkj"
    base, x = copy.deepcopy(model), torch.ones(2, 3)

    def closure(of: torch.nn.Module) -> torch.Tensor:
        return of(x).square().mean()

    optimizer = zokern.MeZO(list(model[0].parameters()), 1e-2, update=update)
    with journal.write(optimizer, path):
        optimizer.step(lambda: closure(model))
        optimizer.add_param_group({"params": list(model[2].parameters())})
        optimizer.step(lambda: closure(model))
        optimizer.step(lambda: closure(model))
    again = {f"parameter {i}": p.detach().clone() for i, p in enumerate(base.parameters())}
    assert journal.replay(path, again).verified
    assert same(list(again.values()), weights(model))
    params = [p.detach().clone() for p in base.parameters()]
    with pytest.raises(TypeError, match="model is a list; give a module, or tensors by name") as told:
        journal.replay(path, params)
    advised = eval(str(told.value).partition("in order: ")[2], {"params": params, "enumerate": enumerate})
    assert journal.replay(path, advised).verified
    few = {name: p.detach().clone() for name, p in list(again.items())[:2]}
    with pytest.raises(
        journal.JournalError, match=r"'parameter 2', which the model does not have; .* all tensors for replay"
    ):
        journal.replay(path, few)
    resumed = copy.deepcopy(base)
    second = zokern.MeZO(list(resumed[0].parameters()), 1e-2, update=update)
    with (
        pytest.raises(journal.JournalError, match=r"'parameter 2', .*: add_param_group before resume"),
        journal.resume(second, path),
    ):
        pass
    assert same(weights(resumed), weights(base))
    second.add_param_group({"params": list(resumed[2].parameters())})
    with journal.resume(second, path) as done:
        assert done == 3
        second.step(lambda: closure(resumed))
    optimizer.step(lambda: closure(model))
    assert same(weights(resumed), weights(model))


def test_what_the_last_wanted_step_lacks_is_known_before_the_first(tmp_path):
    """With until, too, weights are whole where a journal does not fit them: it ends in the step that moves a new group."""
    model, path = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), tmp_path / "a.zkj"
    base = [p.detach().clone() for p in model.parameters()]
    optimizer, late = zokern.MeZO(list(model[0].parameters()), 1e-2, update="adam"), 40
    with journal.write(optimizer, path):
        for t in range(late + 1):
            if t == late:
                optimizer.add_param_group({"params": list(model[1].parameters())})
            optimizer.step(lambda: model(torch.ones(2, 3)).square().mean())
    few = {f"parameter {i}": p.clone() for i, p in enumerate(base[:2])}
    for until in (late + 1, None):
        with pytest.raises(journal.JournalError, match="'parameter 2', which the model does not have"):
            journal.replay(path, few, until=until, verify=False)
        assert same(list(few.values()), base[:2])
    assert journal.replay(path, few, until=late, verify=False) == late
    assert not same(list(few.values()), base[:2])


# ------------------------------------------------------------------------------------------------------ both formats


@pytest.mark.parametrize("name", ["mezo-inplace-float32-auto-plain", "helene-stream-bfloat16-auto-plain"])
def test_a_journal_of_format_1_is_written_on_as_that(name, tmp_path):
    (case,) = [case for case in every() if str(case) == name]
    path = tmp_path / "run.zkj"
    path.write_bytes(store.files()[f"{name}.zkj"])
    assert journal.Reader(path).version == 1
    model, optimizer = optimizer_of(case)
    base = copy.deepcopy(model)
    with journal.resume(optimizer, path) as done:
        steps(case, model, optimizer, done, done + 2, [])
    assert journal.Reader(path).version == 1
    assert journal.replay(path, base) == done + 2
    assert same(weights(base), weights(model))
    assert state_of(path) == "whole"


def test_features_that_a_reader_does_not_know_are_refused(tmp_path):
    path, _, _ = written(tmp_path, 1)
    rewritten(path, features=["folds"])
    with pytest.raises(
        journal.JournalError, match=r"'folds', which this zokern does not know; install a newer zokern$"
    ):
        journal.Reader(path)


def rewritten(path: Path, **changes: Any) -> None:
    """The journal with these entries in its header."""
    text, bodies, version = records.take_apart(path.read_bytes())
    path.write_bytes(records.build(json.dumps({**json.loads(text), **changes}).encode(), bodies, version))


@pytest.mark.parametrize(
    ("update", "changes", "said"),
    [
        ("sgd", {"options": {"num_samples": 3}}, "options['num_samples'] is 3 there, 1 in this optimizer"),
        ("sgd", {"options": {"colour": 3}}, "options['colour'] is 3 there, missing in this optimizer"),
        ("sgd", {"options": {"update": "s" * 999}}, f"options['update'] is '{'s' * 99} ... there, 'sgd' in this optimizer"),
        ("adam", {"states": {"m": ["float32", 1.0]}}, "states['m'] is ['float32', 1.0] there, ['float32', 0.0] in this op"),
        ("sgd", {"states": {"m": ["float32", 0.0]}}, "states['m'] is ['float32', 0.0] there, missing in this optimizer"),
        ("sgd", {"seed": 8}, "seed is 8 there, 0 in this optimizer"),
        ("sgd", {"method": "HiZOO"}, "method is 'HiZOO' there, 'MeZO' in this optimizer"),
    ],
)  # fmt: skip
def test_of_a_journal_of_another_run_the_first_difference_is_told(update, changes, said, tmp_path):
    """Of its settings the one that differs, and no others."""
    path, model = tmp_path / "run.zkj", torch.nn.Linear(2, 2)
    optimizer = zokern.MeZO(model.parameters(), 1e-2, update=update)
    with journal.write(optimizer, path):
        pass
    header = journal.Reader(path).header
    rewritten(path, **{k: {**header[k], **v} if isinstance(v, dict) else v for k, v in changes.items()})
    with (
        pytest.raises(journal.JournalError, match=rf"{re.escape(said)}.*; make them agree$") as told,
        journal.resume(optimizer, path),
    ):
        pass
    assert "betas" not in str(told.value)
    if update == "adam":
        rewritten(path, states={})
        missing = r"states\['m'\] is missing there, \['float32', 0\.0\] in this optimizer; make them agree$"
        with pytest.raises(journal.JournalError, match=missing), journal.resume(optimizer, path):
            pass


def test_records_that_no_reader_would_take_are_not_written(tmp_path):
    path, most = tmp_path / "run.zkj", journal_format.MAX_JSON
    with path.open("wb", buffering=0) as file:
        writer = journal_format.start(file, {})
        before, crc = path.read_bytes(), writer.crc
        for body, said in ((b"", "has 0 bytes"), (bytes(journal_format.MAX_RECORD + 1), "has 16777217 bytes")):
            with pytest.raises(journal.JournalError, match=f"^a record {said}, and a journal takes 1 to 16777216$"):
                writer.append_all([b"first", body])
        for length in (most, most + 1):  # in quotes, of two bytes
            with pytest.raises(
                journal.JournalError, match=f"^a description has {length} bytes, and .* less than {most}$"
            ):
                writer.append_json(journal_format.LAYOUT, "a" * (length - 2))
        assert (path.read_bytes(), writer.crc) == (before, crc)
        writer.append_json(journal_format.LAYOUT, "a" * (most - 3))
    assert path.stat().st_size == len(before) + 4 + 1 + most - 1 + 4  # a length, a kind, the text, a checksum


def test_a_journal_that_goes_away_while_it_is_read_is_told(tmp_path):
    path, _, _ = written(tmp_path, 1)
    reader = journal.Reader(path)
    path.unlink()
    with pytest.raises(journal.JournalError, match=r"run\.zkj: cannot be read \(No such file or directory\)"):
        list(reader.steps())


@pytest.mark.parametrize("rounding", [5, "up", ["auto"], None, "x" * 999])
def test_a_rounding_that_there_is_not_is_refused(rounding, tmp_path):
    """A fold after the journal's last step goes by it."""
    path, _, _ = written(tmp_path, 1)
    options = journal.Reader(path).header["options"]
    rewritten(path, options={**options, "rounding": rounding})
    said = r"its header cannot be right: rounding is .{1,110}, which is none of auto, nearest, stochastic; take another"
    with pytest.raises(journal.JournalError, match=said):
        journal.Reader(path)
    rewritten(path, options={**options, "rounding": "nearest"})
    journal.Reader(path)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_step_whose_numbers_are_cut_off_is_malformed(length, tmp_path):
    path, _, _ = written(tmp_path, 1)
    text, bodies, version = records.take_apart(path.read_bytes())
    (i,) = [i for i, body in enumerate(bodies) if body[0] == journal_format.STEP]
    bodies[i] = bodies[i][:-length]
    path.write_bytes(records.build(text, bodies, version))
    with pytest.raises(
        journal.JournalError, match="malformed: its length does not fit its mask; take another copy of it"
    ):
        list(journal.Reader(path).steps())


# ------------------------------------------------------------------------------------------------------- while writing


def test_a_second_writer_is_told(tmp_path):
    path = tmp_path / "run.zkj"
    model = toy()
    base = copy.deepcopy(model)
    optimizer = zokern.MeZO(model, 1e-2)
    with journal.write(optimizer, path):
        optimizer.step(model)
        before = path.read_bytes()
        for other in (
            lambda: journal.write(zokern.MeZO(base, 1e-2), path, force=True),
            lambda: journal.resume(zokern.MeZO(base, 1e-2), path),
        ):
            with pytest.raises(journal.JournalError, match="another process is writing it"), other():
                pass
        assert path.read_bytes() == before
        optimizer.step(model)
    assert journal.replay(path, base) == 2


def test_the_disk_has_what_is_older_than_the_interval(tmp_path, monkeypatch):
    """sync=0: every record; a long one: the header and the end."""
    counts = []
    for sync in (0.0, 1e9):
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", synced.append)
        model = toy()
        optimizer = zokern.MeZO(model, 1e-2)
        with journal.write(optimizer, tmp_path / f"{sync}.zkj", sync=sync):
            begun = len(synced)
            for _ in range(5):
                optimizer.step(model)
            counts.append(len(synced) - begun)
        assert len(synced) > begun + counts[-1]
    assert counts == [6, 0]  # five steps and a signature


def test_the_interval_begins_anew_each_time(tmp_path, monkeypatch):
    now, synced = [0.0], []
    monkeypatch.setattr(journal_format.time, "monotonic", lambda: now[0])
    path, _, _ = written(tmp_path, 1)
    header = journal.Reader(path).header
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(now[0]))
    with path.open("r+b", buffering=0) as file:
        writer = journal_format.start(file, header, sync=10.0)
        for second in range(1, 36):
            now[0] = float(second)
            writer.append_json(journal_format.LAYOUT, {"params": [], "layers": None})
    assert synced == [0.0, 10.0, 20.0, 30.0]


def test_a_record_that_was_written_in_part_is_taken_back(tmp_path):
    """A full disk takes some bytes of a record: the file ends with the last whole one, and the next is good."""

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 10**9

        def write(self, data):
            size = min(len(data), max(self.room, 0), 7)
            self.room -= size
            if not size:
                raise OSError(28, "No space left on device")
            return self.file.write(bytes(data[:size]))

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "run.zkj"
    written(tmp_path, 1)
    header = journal.Reader(path).header
    with path.open("r+b", buffering=0) as raw:
        raw.truncate()
        file = Full(raw)
        writer = journal_format.start(file, header)
        writer.append_json(journal_format.LAYOUT, {"params": [], "layers": None})
        size, file.room = path.stat().st_size, 5
        with pytest.raises(OSError, match="No space"):
            writer.append_json(journal_format.MARK, {"step": 0, "hash": header["base"]})
        assert path.stat().st_size == size
        file.room = 1000
        writer.append_json(journal_format.MARK, {"step": 0, "hash": header["base"]})
    assert state_of(path) == "whole"


def test_a_journal_that_is_removed_while_it_is_written_is_told(tmp_path):
    model, path = toy(), tmp_path / "run.zkj"
    optimizer = zokern.MeZO(model, 1e-2)

    def run() -> None:
        with journal.write(optimizer, path):
            optimizer.step(model)
            path.unlink()

    with pytest.warns(zokern.ZokernWarning, match="removed while it was written"):
        run()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_file_that_cannot_be_begun_is_not_left_behind(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_format.Writer, "_write", full)
    with pytest.raises(OSError, match="No space"), journal.write(zokern.MeZO(toy(), 1e-2), tmp_path / "run.zkj"):
        pass
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ the command line


def test_show_says_the_state_and_shows_what_can_be_read(tmp_path):
    path, _, _ = written(tmp_path)
    data = path.read_bytes()
    assert "state       whole" in command("journal", "show", path)[1]
    path.write_bytes(data[:-7])
    code, said = command("journal", "show", path)
    assert (code, "torn: " in said, "steps       6 (" in said) == (0, True, True)
    reader = journal.Reader(path)
    next(reader.steps())
    path.write_bytes(data[: reader.end] + b"\x00" + data[reader.end + 1 :])
    code, said = command("journal", "show", path)
    assert (code, "state       damaged" in said, "steps       1 (" in said) == (1, True, True)


def test_diff_says_where_a_journal_ends(tmp_path):
    path, _, _ = written(tmp_path)
    cut = tmp_path / "cut.zkj"
    reader = journal.Reader(path)
    for _ in zip(range(3), reader.steps(), strict=False):
        pass
    cut.write_bytes(path.read_bytes()[: reader.end + 5])
    code, said = command("diff", path, cut)
    assert (code, "at step 3, which only" in said, "5 bytes after step 3 are no record" in said) == (1, True, True)


def test_diff_takes_a_setting_that_came_later_at_its_default(tmp_path):
    path, _, _ = written(tmp_path)
    header, bodies, _ = records.take_apart(path.read_bytes())
    value = json.loads(header)
    assert value["options"].pop("one_sided") is False
    for left, code in (({}, 0), ({"one_sided": True}, 1)):
        older = tmp_path / "older.zkj"
        older.write_bytes(
            records.build(json.dumps({**value, "options": {**value["options"], **left}}).encode(), bodies)
        )
        assert command("diff", path, older)[0] == code


def test_a_stranger_s_text_is_not_sent_to_the_terminal(tmp_path):
    path, _, _ = written(tmp_path, 1)
    header = {**journal.Reader(path).header, "method": "\x1b[2JMeZO\u202e", "zokern": "\x07", "options": {"\x9b": "\r"}}
    with path.open("wb") as file:
        journal_format.start(file, header)
    code, said = command("journal", "show", path)
    assert code == 0
    assert all(c.isprintable() for c in said.replace("\n", ""))
    assert "\\x1b[2JMeZO" in said


def test_a_truncated_journal_is_never_replayed_with_exit_code_0(tmp_path):
    """Every prefix: an error, but for --no-verify, which says what is missing."""
    from safetensors.torch import save_file

    path, base, _ = written(tmp_path, 3)
    save_file(dict(base.named_parameters()), tmp_path / "base.safetensors")
    data, cut = path.read_bytes(), tmp_path / "cut.zkj"
    rng = random.Random(3)
    for size in [0, 7, 20, *rng.sample(range(len(data)), 25)]:
        cut.write_bytes(data[:size])
        code, said = command("replay", tmp_path / "base.safetensors", cut, "-o", tmp_path / "out.safetensors")
        assert (code, "error: " in said) == (1, True), size
        assert not (tmp_path / "out.safetensors").exists()
    cut.write_bytes(data[:-9])
    code, said = command(
        "replay", tmp_path / "base.safetensors", cut, "-o", tmp_path / "out.safetensors", "--no-verify"
    )
    assert (code, "3 steps replayed" in said, "not verified" in said) == (0, True, True)


def test_warnings_are_not_needed_for_a_whole_journal(tmp_path):
    path, base, model = written(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert journal.replay(path, base).verified
    assert isinstance(model, Toy)

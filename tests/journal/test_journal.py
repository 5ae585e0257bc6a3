"""The journal: what it says is what was done, to the last bit, and nothing but a whole one is believed.

Every method writes one under every placement; a replay and a run taken up from it end with the bits of the run itself.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import multiprocessing
import os
import random
import signal
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import zokern
from tests import devices, methods
from tests.models import Toy, small, toy
from tests.pairs import label, pairs
from zokern import journal
from zokern.cli import app
from zokern.journal import format as journal_format
from zokern.journal import tools
from zokern.passes.spec import MAX_CHAIN_SEEDS, MAX_STAGES

CASES: dict[str, tuple[str, dict[str, Any]]] = {  # a case of all methods, with other options
    "mezo": ("mezo", {"num_samples": 1}),
    "mezo-samples-decay": ("mezo", {"weight_decay": 0.1, "distribution": "rademacher"}),
    "mezo-adam": ("mezo-adam", {}),
    "mezo-adamezo": ("mezo-adamezo", {}),
    "mezo-adamezo-released": ("mezo-adamezo-released", {}),
    "mezo-momentum": ("mezo-momentum", {"num_samples": 1}),
    "mezo-sign": ("mezo-sign", {"num_samples": 1, "one_sided": True}),
    "hizoo": ("hizoo", {"smoothing": 1e-4, "curvature_dtype": torch.bfloat16}),
    "helene": ("helene-by-layer", {"num_samples": 1, "hessian_interval": 2}),
    "mezo-gv": ("gv-curved", {"candidates": 4, "elite": 0.5}),
    "mezo-gv-kept": ("gv-kept", {}),
    "mezo-greedy": ("greedy", {}),
    "fzoo": ("fzoo", {}),
    "es": ("es", {"num_directions": 3}),
}
replaying = importlib.import_module("zokern.journal.replay")  # the package's function has the same name
PLACEMENTS = ("inplace", "shadow", "stream")


def build(case: str, model: nn.Module, **options: Any) -> Any:
    name, own = CASES[case]
    return methods.build(methods.METHODS[name], model, **{**own, **options})


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Trouble:
    """A closure that has a loss that is not finite in one step, and raises in the middle of another."""

    def __init__(self, model: Toy, calls: int = 0) -> None:
        self.model, self.calls, self.raises = model, calls, False

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        loss = self.model()
        if self.raises:
            self.raises = False
            raise OSError("in a forward")
        return loss * (math.nan if self.calls == 23 else 1.0)


def steps(optimizer: Any, scheduler: Any, closure: Trouble, numbers: range) -> None:
    for number in numbers:
        if number == 4:
            closure.raises = True
            with pytest.raises(OSError, match="in a forward"):
                optimizer.step(closure)
        optimizer.step(closure)
        scheduler.step()


def scheduled(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))


def test_a_torn_record_is_dropped_with_a_warning(tmp_path):
    path, base, _ = written(tmp_path)
    whole = list(journal.Reader(path).steps())
    with path.open("ab") as file:
        file.write(b"\x10abc")
    with (
        pytest.warns(zokern.ZokernWarning, match=r"last 4 bytes.*kept as run\.zkj\.cut"),
        journal.resume(zokern.MeZO(base, 1e-2), path),
    ):
        pass
    assert len(list(journal.Reader(path).steps())) == len(whole)
    assert (tmp_path / "run.zkj.cut").read_bytes() == b"\x10abc"


@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning", "ignore:Detected call of:UserWarning")
@pytest.mark.parametrize(
    ("case", "placement", "dtype", "dropped"),
    pairs(list(CASES), PLACEMENTS, [torch.float32, torch.bfloat16], [None, 2]),
    ids=label,
)
def test_replay_and_resume_give_the_bits_of_the_run(case, placement, dtype, dropped, tmp_path):
    """With a scheduler, a skipped step, a step that an exception broke off, LeZO, states, stochastic rounding."""
    options = {"placement": placement, "layers": None if dropped is None else zokern.RandomBlocks(dropped)}
    model, path = toy(dtype), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), build(case, model, **options)
    scheduler, closure = scheduled(optimizer), Trouble(model)
    with journal.write(optimizer, path):
        steps(optimizer, scheduler, closure, range(3))
        middle, calls, size = weights(model), closure.calls, path.stat().st_size
        steps(optimizer, scheduler, closure, range(3, 12))
    assert optimizer.skipped_steps <= 1
    again = copy.deepcopy(base)
    assert journal.replay(path, again) == 12
    assert same(weights(again), weights(model))
    again = copy.deepcopy(base)
    assert journal.replay(path, again, until=3) == 3
    assert same(weights(again), middle)

    cut = tmp_path / "cut.zkj"
    cut.write_bytes(path.read_bytes()[: size + 3])  # three bytes of the next record
    resumed = copy.deepcopy(base)
    second = build(case, resumed, **options)
    scheduler = scheduled(second)
    with journal.resume(second, cut) as done:  # warns of the record that was cut off
        assert done == 3
        assert same(weights(resumed), middle)
        for _ in range(done):
            scheduler.step()
        steps(second, scheduler, Trouble(resumed, calls), range(3, 12))
    assert same(weights(resumed), weights(model))
    assert second.skipped_steps == optimizer.skipped_steps
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert optimizer.state[p].keys() == second.state[q].keys()
        assert all(torch.equal(optimizer.state[p][name], second.state[q][name]) for name in optimizer.state[p])
    again = copy.deepcopy(base)
    assert journal.replay(cut, again) == 12
    assert same(weights(again), weights(model))
    assert tools.first_difference(path, cut) is None


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_a_replay_on_another_backend_gives_the_same_bits(backend, tmp_path):
    if devices.device_of(backend).type != "cpu":
        pytest.skip(f"{backend} does not run on CPU tensors here")
    model, path = toy(torch.bfloat16), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), build("hizoo", model, placement="shadow")
    with journal.write(optimizer, path):
        for _ in range(3):
            optimizer.step(model)
    journal.replay(path, base, backend=backend)
    assert same(weights(base), weights(model))


def written(tmp_path: Path, number: int = 6, **options: Any) -> tuple[Path, Toy, Toy]:
    """A journal of MeZO, its base and its result."""
    model, path = toy(), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), zokern.MeZO(model, 1e-2, **options)
    with journal.write(optimizer, path):
        for _ in range(number):
            optimizer.step(model)
    return path, base, model


def test_a_step_of_mezo_takes_at_most_24_bytes(tmp_path):
    """Also with weight decay and a scheduler, which change two numbers more in each step."""
    model, path, sizes = toy(), tmp_path / "run.zkj", []
    optimizer = zokern.MeZO(model, 1e-2, weight_decay=0.1)
    scheduler = scheduled(optimizer)
    with journal.write(optimizer, path):
        for _ in range(40):
            optimizer.step(model)
            scheduler.step()
            sizes.append(path.stat().st_size)
    assert max(np.diff(sizes[2:])) <= 24


def test_writing_needs_a_new_file_and_a_run_without_states(tmp_path):
    path, _, model = written(tmp_path)
    before = path.read_bytes()
    another = zokern.MeZO(model, 1e-2)
    with pytest.raises(journal.JournalError, match=r"run\.zkj exists.*force"), journal.write(another, path):
        pass
    assert path.read_bytes() == before
    optimizer = zokern.HiZOO(model, 1e-2)
    optimizer.step(model)
    with pytest.raises(journal.JournalError, match="has states"), journal.write(optimizer, tmp_path / "new.zkj"):
        pass
    assert not (tmp_path / "new.zkj").exists()
    optimizer = zokern.MeZO(model, 1e-2)
    with (
        journal.write(optimizer, tmp_path / "a.zkj"),
        pytest.raises(journal.JournalError, match="already"),
        journal.write(optimizer, tmp_path / "b.zkj"),
    ):
        pass
    with journal.write(optimizer, path, force=True):
        optimizer.step(model)
    assert len(list(journal.Reader(path).steps())) == 1


def test_a_journal_may_begin_in_the_middle_of_a_run_without_states(tmp_path):
    model, path = toy(), tmp_path / "run.zkj"
    optimizer = zokern.MeZO(model, 1e-2)
    for _ in range(3):
        optimizer.step(model)
    base = copy.deepcopy(model)
    with journal.write(optimizer, path):
        optimizer.step(model)
    assert journal.replay(path, base) == 4
    assert same(weights(base), weights(model))


def test_what_a_script_draws_is_asked_for_with_the_same_seed(tmp_path):
    """An adapter of PEFT, made by the script: with another start it is refused, by the message's advice it is replayed."""
    peft = pytest.importorskip("peft")
    base, path = toy(), tmp_path / "run.zkj"

    def adapted(seed):
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["inner"]))

    model, other, again = adapted(1), adapted(2), adapted(1)
    optimizer = zokern.MeZO(model, 1e-2)
    with journal.write(optimizer, path):
        for _ in range(3):
            optimizer.step(model)
    with pytest.raises(journal.JournalError, match=r"give its base model\. What the script drew .* with the same seed"):
        journal.replay(path, other)
    with pytest.raises(
        journal.JournalError, match="which the model does not have; give the model that was trained, with"
    ):
        journal.replay(path, copy.deepcopy(base), verify=False)
    assert journal.replay(path, again) == 3
    assert same(weights(again), weights(model))


def test_another_base_or_optimizer_is_refused(tmp_path):
    path, base, model = written(tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.norm.bias[0] += 1e-3
    before = weights(other)
    with pytest.raises(journal.JournalError, match="not those that the run started from"):
        journal.replay(path, other)
    for optimizer, word in (
        (zokern.MeZO(other, 1e-2), "weights are not"),
        (zokern.MeZO(base, 1e-2, seed=1), "seed is 0 there, 1"),
        (zokern.MeZO(base, 1e-2, num_samples=2), "options"),
        (zokern.HiZOO(base, 1e-2), "method is 'MeZO' there, 'HiZOO'"),
        (zokern.MeZO(base, 1e-2, placement="shadow"), "placement"),
    ):
        with pytest.raises(journal.JournalError, match=word), journal.resume(optimizer, path):
            pass
    assert same(weights(other), before)
    with pytest.raises(journal.JournalError, match="until is 7, and the journal ends after 6"):
        journal.replay(path, copy.deepcopy(base), until=7)
    missing = {name: p for name, p in base.named_parameters() if name != "norm.bias"}
    with pytest.raises(journal.JournalError, match=r"norm\.bias"):
        journal.replay(path, missing, verify=False)
    assert model is not base


def test_a_result_that_is_not_training_s_is_noticed(tmp_path):
    """The marks hold a hash of the weights: here of weights that somebody changed before the journal ended."""
    model, path = toy(), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), zokern.MeZO(model, 1e-2)
    with journal.write(optimizer, path):
        optimizer.step(model)
        with torch.no_grad():
            model.norm.bias[0] += 1.0
    with pytest.raises(journal.JournalError, match="not those that training had"):
        journal.replay(path, copy.deepcopy(base))
    assert journal.replay(path, base, verify=False) == 1


@pytest.mark.parametrize(
    ("case", "steps", "options", "passes"),
    [
        # Nothing is rounded between first-order passes over float32 weights without decay: their seeds go in one pass.
        ("MeZO", 300, {"placement": "shadow"}, math.ceil(300 / MAX_CHAIN_SEEDS)),
        ("MeZO", 12, {"placement": "inplace"}, 1),
        ("MeZO", 40, {"placement": "shadow", "weight_decay": 0.1}, math.ceil(40 / MAX_STAGES)),
        ("MeZO", 40, {"placement": "shadow", "dtype": torch.bfloat16}, math.ceil(40 / MAX_STAGES)),
        ("MeZO", 40, {"placement": "inplace", "dtype": torch.float16}, math.ceil(40 * 3 / MAX_STAGES)),
        ("HiZOO", 33, {"placement": "shadow", "dtype": torch.bfloat16}, 2),
        ("HiZOO", 10, {"placement": "inplace", "dtype": torch.bfloat16, "curvature_dtype": torch.bfloat16}, 1),
        ("HELENE", 20, {"placement": "inplace", "hessian_interval": 3}, math.ceil(20 * 3 / MAX_STAGES)),
        ("ES", 4, {"placement": "shadow", "maximize": True, "num_directions": 60}, 2),
        ("ES", 3, {"placement": "shadow", "maximize": True, "num_directions": 100, "dtype": torch.bfloat16}, 3),
    ],
)
def test_many_steps_are_one_pass(tmp_path, case, steps, options, passes):
    """A replay moves memory once for up to 32 passes or 128 seeds, and gives training's bits."""
    dtype = options.pop("dtype", torch.float32)
    model, path = toy(dtype), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), getattr(zokern, case)(model, 1e-2, **options)
    with journal.write(optimizer, path):
        for _ in range(steps):
            optimizer.step(model)
    reader = journal.Reader(path)
    player = replaying.Player(reader, dict(base.named_parameters()), replaying.fresh_states(reader.header))
    for step in reader.steps():
        player.play(step)
    player.flush()
    assert same(weights(base), weights(model))
    assert not same(weights(base), weights(toy(dtype)))
    assert player.passes.counters.passes == passes
    assert player.passes.counters.elements_moved == passes * 2 * sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------- damage and hostility


def test_damage_at_the_end_is_known_before_anything_changes(tmp_path):
    path, base, _ = written(tmp_path, 6)
    data, before = bytearray(path.read_bytes()), weights(base)
    data[-3] ^= 1  # of the mark
    path.write_bytes(bytes(data))
    with pytest.raises(journal.JournalError, match="after step 6 are no record: cut off or changed at its end"):
        journal.replay(path, base)
    reader = journal.Reader(path)
    *_, last = reader.steps()
    data[-3] ^= 1
    data[reader.end - 6] ^= 1  # of the last step: a mark follows
    path.write_bytes(bytes(data))
    assert last.number == 5
    with pytest.raises(journal.JournalError, match="damaged"):
        journal.replay(path, base)
    with pytest.raises(journal.JournalError, match="damaged"), journal.resume(zokern.MeZO(base, 1e-2), path):
        pass
    assert same(weights(base), before)


@pytest.mark.parametrize(
    ("kind", "value", "word"),
    [
        (1, {"params": [], "layers": [1, 1 << 40]}, "number of blocks"),
        (1, {"params": [[0]], "layers": None}, "malformed"),
        (1, {}, "malformed"),
        (
            2,
            {"numbers": 2, "passes": [{"rule": "none", "seeds": [], "rows": 1}], "memory": 0, "groups": 1},
            "malformed",
        ),
        (
            2,
            {"numbers": 2, "passes": [{"rule": "axpy", "seeds": [[0, 0]], "rows": 1}], "memory": 0, "groups": 1},
            "numbers is 2, and its passes have 4",
        ),
        (2, {"numbers": 2}, "malformed"),
    ],
)
def test_hostile_layouts_and_signatures_are_refused(kind, value, word, tmp_path):
    path, base, _ = written(tmp_path, 1)
    reader, before = journal.Reader(path), weights(base)
    list(reader.steps())
    with path.open("ab") as file:
        writer = journal_format.Writer(file, reader.crc)
        writer.append_json(kind, value)
        number = len(reader.signatures) if kind == 2 else 0
        writer.append(bytes([3]) + journal_format.varint(number) + b"\0")
    with pytest.raises(journal.JournalError, match=word):
        journal.replay(path, base)
    assert same(weights(base), before)


def read_all(path: Path) -> tuple[list[Any], bool]:
    reader = journal.Reader(path)
    return [(s.number, s.flags, s.frame.tobytes()) for s in reader.steps()], reader.torn


def test_every_cut_is_torn_or_whole_and_keeps_the_steps_before_it(tmp_path):
    path, _, _ = written(tmp_path, 4)
    data, whole = path.read_bytes(), read_all(path)[0]
    reader = journal.Reader(path)
    header_end, ends = reader.end, []
    for _ in reader.steps():
        ends.append(reader.end)
    short = tmp_path / "cut.zkj"
    for size in range(len(data)):
        short.write_bytes(data[:size])
        if size < header_end:
            with pytest.raises(journal.JournalError, match=r"cut\.zkj"):
                journal.Reader(short)
            continue
        got, torn = read_all(short)
        assert got == whole[: sum(end <= size for end in ends)]
        reader = journal.Reader(short)
        list(reader.steps())
        assert torn == (reader.end < size)


def test_every_changed_byte_is_noticed(tmp_path):
    """At worst a changed length makes a record look cut off; never is a wrong number believed."""
    path, _, _ = written(tmp_path, 4)
    data, whole = path.read_bytes(), read_all(path)[0]
    rng, bad = random.Random(0), tmp_path / "bad.zkj"
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        bad.write_bytes(bytes(changed))
        try:
            got, torn = read_all(bad)
        except journal.JournalError:
            continue
        assert torn
        assert got == whole[: len(got)]


def test_records_cannot_be_moved_or_left_out(tmp_path):
    path, _, _ = written(tmp_path, 6)
    data, reader, ends = path.read_bytes(), journal.Reader(path), []
    for _ in reader.steps():
        ends.append(reader.end)
    a, b, c = ends[1], ends[2], ends[3]
    moved = tmp_path / "moved.zkj"
    for order in (data[:a] + data[b:], data[:a] + data[b:c] + data[a:b] + data[c:], data[:b] + data[a:]):
        moved.write_bytes(order)
        with pytest.raises(journal.JournalError, match=r"damaged at byte \d+, after step [23].*--until"):
            read_all(moved)


def record(body: bytes, crc: int) -> bytes:
    data = journal_format.varint(len(body)) + body
    return data + struct.pack("<I", zlib.crc32(data, crc))


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (bytes([9]), r"kind 9 \(unknown\); install a newer zokern"),
        (bytes([6]), r"kind 6 \(ranks\); install a newer zokern"),
        (bytes([5]), "malformed: it ends within a number; take another copy of it"),
        (bytes([2]) + b"{", "no JSON"),
        (bytes([2]) + b"[1]", "no JSON object"),
        (bytes([2]) + json.dumps({"numbers": 1 << 40}).encode(), "memory is no whole number"),
        (bytes([2]) + json.dumps({"numbers": -1}).encode(), "memory is no whole number"),
        (bytes([2]) + b'{"a":' * 100000, "no JSON"),
        (bytes([3, 5]), "refers to signature 5"),
        (bytes([3]), "malformed: it ends within a number"),
        (bytes([3 | 3 << 4, 0, 0]), "its flags are 3"),
        (bytes([3, 0x80, 0x80, 0x80, 0x80, 0x80, 1]), "malformed: a number of more than 32 bits"),
    ],
)
def test_a_hostile_record_with_a_right_checksum_is_refused(body, word, tmp_path):
    path, _, _ = written(tmp_path, 1)
    reader = journal.Reader(path)
    list(reader.steps())
    with path.open("ab") as file:
        file.write(record(body, reader.crc))
    with pytest.raises(journal.JournalError, match=word):
        read_all(path)


def test_bits_of_a_mask_beyond_its_frame_are_refused():
    """One frame has one encoding: what a reader ignored could hide anything."""
    last = np.zeros(3, np.float32)
    body = journal_format.encode_step(0, 0, np.float32([1, 0, 0]), last)
    assert body[2] == 0b001
    with pytest.raises(ValueError, match="mask"):
        journal_format.decode_step(body[:2] + bytes([0b1001]) + body[3:], [last])


def test_lengths_are_bounded(tmp_path):
    """A file of some bytes cannot make the reader ask for gigabytes."""
    path = tmp_path / "big.zkj"
    path.write_bytes(journal_format.magic(2) + struct.pack("<I", 0xFFFFFFF0) + b"{}")
    with pytest.raises(journal.JournalError, match="claims 4294967280 bytes"):
        journal.Reader(path)
    path, _, _ = written(tmp_path, 1)
    whole = read_all(path)[0]
    with path.open("ab") as file:
        file.write(b"\xff\xff\xff\xff\x0f" + b"x" * 100)
    assert read_all(path) == (whole, True)


@pytest.mark.parametrize("content", [b"", b"zk", b"PK\x03\x04" + b"x" * 100, b"\x80\x04\x95" + b"x" * 100])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(journal.JournalError, match="other: not a zokern journal"):
        journal.Reader(path)
    with pytest.raises(journal.JournalError, match="missing: cannot be read"):
        journal.Reader(tmp_path / "missing")
    path.write_bytes(journal_format.magic(3) + b"\0" * 20)
    with pytest.raises(journal.JournalError, match=r"version 3.*newer zokern"):
        journal.Reader(path)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    st.sampled_from([0, journal_format.SKIPPED, journal_format.BROKEN_OFF]),
    st.integers(0, 300),
)
def test_frames_come_back_with_all_their_bits(last, now, flags, signature):
    """Any bits, NaN payloads and negative zeros too."""
    size = min(len(last), len(now))
    old, new = (np.array(x[:size], np.uint32).view(np.float32) for x in (last, now))
    body = journal_format.encode_step(signature, flags, new, old)
    got = journal_format.decode_step(body, [old] * (signature + 1))
    assert got[:2] == (signature, flags)
    assert np.array_equal(got[2].view(np.uint32), new.view(np.uint32))


# ---------------------------------------------------------------------------------------------------------------- kill


def train(path: Path, number: int, resume: bool) -> None:
    """In a process of its own, which may be killed at any time."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = small(torch.bfloat16)
    optimizer = zokern.HiZOO(model, 1e-2, smoothing=1e-4, placement="shadow", layers=zokern.RandomBlocks(1))
    context: Callable[..., Any] = journal.resume if resume else journal.write
    with context(optimizer, path):
        while optimizer.counters["steps"] < number:
            optimizer.step(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    killed_again_and_again(tmp_path, number=1200, kills=20, seconds=300)


def killed_again_and_again(tmp_path: Path, number: int, kills: int, seconds: float) -> None:
    """kill -9 at random moments; each time the run is taken up from its base and its journal alone."""
    path, wanted, kills = tmp_path / "run.zkj", kills, 0
    train(tmp_path / "whole.zkj", number, resume=False)
    fork, rng, begun = multiprocessing.get_context("fork"), random.Random(1), time.monotonic()
    while True:
        started = False
        if path.exists():
            try:
                journal.Reader(path)
                started = True
            except journal.JournalError:
                path.unlink()  # killed before its header was whole
        child = fork.Process(target=train, args=(path, number, started))
        child.start()
        if kills < wanted:
            size, wait = path.stat().st_size if path.exists() else 0, rng.random() * 600
            while child.is_alive() and (not path.exists() or path.stat().st_size < size + wait):
                time.sleep(0.001)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        assert time.monotonic() - begun < seconds
    assert kills == wanted
    assert tools.first_difference(tmp_path / "whole.zkj", path) is None
    results = []
    for name in ("whole.zkj", "run.zkj"):
        model = small(torch.bfloat16)
        assert journal.replay(tmp_path / name, model) == number
        results.append(weights(model))
    assert same(*results)


# ------------------------------------------------------------------------------------------------------ the command line


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.output


def test_replay_of_a_file_of_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    path, base, model = written(tmp_path)
    save_file(dict(base.named_parameters()), tmp_path / "base.safetensors")
    arguments = ["replay", tmp_path / "base.safetensors", path, "-o", tmp_path / "tuned.safetensors"]
    code, said = command(*arguments)
    assert (code, said.strip()) == (0, f"6 steps replayed; the model is {tmp_path / 'tuned.safetensors'}")
    tuned = load_file(tmp_path / "tuned.safetensors")
    assert all(torch.equal(tuned[name], p) for name, p in model.named_parameters())
    code, said = command(*arguments)
    assert (code, "--force" in said) == (1, True)
    code, said = command(*arguments, "--force", "--until", "2")
    assert (code, "2 steps replayed" in said, "(not verified)" in said) == (0, True, True)
    assert "no hash of the weights after step 2" in said
    assert command(*arguments, "--force", "--until", "99")[0] == 1
    assert not torch.equal(load_file(tmp_path / "tuned.safetensors")["norm.bias"], tuned["norm.bias"])
    assert not list(tmp_path.glob("*.tmp"))
    code, said = command("replay", tmp_path / "nothing", path, "-o", tmp_path / "x")
    assert (code, "nothing is not a file" in said) == (1, True)


def test_show(tmp_path):
    path, _, _ = written(tmp_path)
    code, said = command("journal", "show", path, "--plot", tmp_path / "plot.png")
    assert code == 0
    assert "MeZO, normal noise, seed 0, inplace" in said
    assert "6 (0 skipped, 0 broken off)" in said
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert command("journal", "show", tmp_path / "none")[0] == 1


def test_diff_names_the_first_difference(tmp_path):
    paths = []
    for i, (lrs, seed) in enumerate((((1e-2,) * 5, 0), ((1e-2, 1e-2, 2e-2, 1e-2, 1e-2), 0), ((1e-2,) * 5, 1))):
        model = toy()
        optimizer = zokern.MeZO(model, 1e-2, seed=seed)
        paths.append(tmp_path / f"{i}.zkj")
        with journal.write(optimizer, paths[-1]):
            for lr in lrs:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step(model)
    assert command("diff", paths[0], paths[0]) == (0, "the runs are the same, step by step\n")
    code, said = command("diff", paths[0], paths[1])
    assert (code, said) == (1, "the runs differ at step 2, in lr: 0.00999999978 and 0.0199999996\n")
    code, said = command("diff", paths[0], paths[2])
    assert (code, said) == (1, "the runs differ before the first step, in seed: 0 and 1\n")
    optimizer = zokern.MeZO(toy(), 1e-2, num_samples=2)
    with journal.write(optimizer, tmp_path / "3.zkj"):
        pass
    code, said = command("diff", paths[0], tmp_path / "3.zkj")
    assert (code, said) == (1, "the runs differ before the first step, in options['num_samples']: 1 and 2\n")
    code, said = command("diff", paths[0], tmp_path / "none")
    assert (code, "cannot be read" in said) == (2, True)


def test_a_record_that_could_not_be_written_ends_the_journal(tmp_path, monkeypatch):
    """A full disk, say: the step is done and counted, what is there replays, and nothing is written after the gap."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    base = copy.deepcopy(model)
    opt = zokern.MeZO(model, 1e-2)
    path = tmp_path / "run.zkj"

    def step() -> None:
        opt.step(lambda: model(torch.ones(2, 4)).square().mean())

    append, full = journal_format.Writer.append, []

    def limited(self, body: bytes) -> None:
        if full:
            raise OSError(28, "No space left on device")
        append(self, body)

    monkeypatch.setattr(journal_format.Writer, "append", limited)
    with journal.write(opt, path):
        step()
        after = copy.deepcopy(model.state_dict())
        full.append(True)
        with pytest.raises(OSError, match="No space left"):
            step()
        assert opt.counters["steps"] == 2
        full.clear()
        with pytest.raises(journal.JournalError, match=r"record of step 1 could not be written.*start another one"):
            step()
        assert opt.counters["steps"] == 2, "refused before anything was changed"
    with pytest.raises(journal.JournalError, match="no hash of the weights after step 1"):
        journal.replay(path, base)
    assert journal.replay(path, base, verify=False) == 1
    assert all(torch.equal(value, after[name]) for name, value in base.state_dict().items())

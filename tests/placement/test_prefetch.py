"""prefetch=True: a block's scratch is filled beside the block before. The bits are stream's, whatever happens."""

from __future__ import annotations

import copy
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

import zokern
from tests.methods import METHODS
from tests.models import BLOCKS, Block, Toy, toy
from tests.pairs import pairs
from tests.placement.side_streams import Late, Recording, lanes_of, prefetching, settled
from tests.placement.streaming import State, run
from tests.placement.test_pipelined import run as steps_of
from tests.placement.test_pipelined import same
from tests.placement.test_stream_clean import step_with_signal_at
from tests.placement.test_stream_handles import HANDLED
from zokern import journal
from zokern.placement.order import Order
from zokern.placement.prefetched import Prefetched

DTYPES = [torch.float32, torch.bfloat16]
KINDS = pytest.mark.parametrize("kind", [None, Recording, Late])


# ------------------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize(("name", "kind"), [(name, Late) for name in METHODS] + [("mezo", None), ("hizoo", Recording)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_stream(name: str, dtype: torch.dtype, kind: Any, monkeypatch) -> None:
    case = METHODS[name]
    plain = steps_of("stream", False, case, dtype, steps=3)
    lanes = lanes_of(monkeypatch, kind)
    ahead = steps_of("stream", False, case, dtype, steps=3, prefetch=True)
    same(plain, ahead)
    assert plain[1].counters == ahead[1].counters
    assert isinstance(ahead[1]._placement, Prefetched)
    settled(lanes)


@pytest.mark.parametrize(
    ("pipelined", "dropped", "kind", "name"),
    pairs([True, False], [0, 1, 2], [None, Recording, Late], ["mezo", "hizoo", "fzoo"]),
)
def test_pipelined_and_with_blocks_left_out(pipelined: bool, dropped: int, kind: Any, name: str, monkeypatch) -> None:
    plain = steps_of("stream", False, METHODS[name], num_dropped=dropped)
    lanes = lanes_of(monkeypatch, kind)
    ahead = steps_of("stream", pipelined, METHODS[name], num_dropped=dropped, prefetch=True)
    same(plain, ahead)
    settled(lanes)
    assert pipelined or plain[1].counters == ahead[1].counters
    if kind is not None and not dropped:  # with a first forward that nothing was known of
        forwards = ahead[1].counters["forwards"] - (
            5 if name in ("hizoo", "fzoo") else 0
        )  # those of the weights themselves
        assert sum(lane.events for lane in lanes) == 4 * forwards


@pytest.mark.parametrize("build", HANDLED.values(), ids=HANDLED)
@pytest.mark.parametrize("kind", [Recording, Late])
def test_what_stream_handles(build: Any, kind: Any, monkeypatch) -> None:
    """Blocks that run twice, in loops, in checkpoints, that fail and are called again: in the first forward and later."""
    one, losses, _ = run(build, "stream", torch.bfloat16, steps=3)
    lanes = lanes_of(monkeypatch, kind)
    two, others, opt = run(build, "stream", torch.bfloat16, steps=3, prefetch=True)
    assert isinstance(opt._placement, Prefetched)
    assert all(torch.equal(a, b) for a, b in zip(losses, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    settled(lanes)


class Writing(Block):
    """Changes what it computes with, which is written anew for each call."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.gain.mul_(1.5)
        return y


class Turning(Toy):
    """Its blocks run in orders that change from forward to forward, some of them again, all of them again."""

    def __init__(self) -> None:
        super().__init__(Writing)
        self.forwards = 0

    def run(self, x: Tensor) -> Tensor:
        orders = [
            [0, 1, 2, 3],
            [0, 1, 2, 3, 2, 3],
            [3, 2, 1, 0],
            [0, 1, 2, 3] * 2,
            [0, 1, 2, 3],
            [0, 0, 1, 1, 2, 3, 3],
            [2, 0, 3, 1, 0],
        ]
        order = orders[self.forwards % len(orders)]
        self.forwards += 1
        for i in order:
            x = self.layers[i](x)
        return x


@KINDS
def test_another_order_in_each_forward(kind: Any, monkeypatch) -> None:
    one, losses, plain = run(Turning, "stream", torch.bfloat16, steps=8)
    lanes = lanes_of(monkeypatch, kind)
    two, others, opt = run(Turning, "stream", torch.bfloat16, steps=8, prefetch=True)
    assert all(torch.equal(a, b) for a, b in zip(losses, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    settled(lanes)
    size = 2 * sum(p.numel() for p in one.layers[0].parameters())
    in_vain = (opt.counters["elements_moved"] - plain.counters["elements_moved"]) / size
    assert in_vain == int(in_vain) > 0  # what was filled and not called is counted
    assert opt.counters["passes"] == plain.counters["passes"]


def test_an_order_is_found_again_after_what_was_not_foreseen() -> None:
    a, b, c, d, other = (object() for _ in range(5))
    order = Order([a, b, c, a, d])
    assert order.next is a
    for called, coming in [(a, b), (a, d), (d, None), (other, None), (c, a), (b, c)]:
        order.call(called)
        assert order.next is coming
    order.learn()
    assert (order.known, order.called, order.next) == ([a, a, d, other, c, b], [], a)
    assert Order([a, b, a, b]).rounds([a, b]) == 2
    assert Order([a, b, a]).rounds([a, b]) == Order([b, a]).rounds([a, b]) == Order().rounds([]) == 0


def test_autocast_and_accumulation(monkeypatch) -> None:
    found = []
    for prefetch in (False, True):
        lanes_of(monkeypatch, Late)
        model, losses = toy(), []
        opt = prefetching(model, prefetch=prefetch, layers=zokern.RandomBlocks(1))
        with torch.autocast("cpu", torch.bfloat16):
            losses = [opt.step(lambda scale, m=model: m() * scale, [1.0, 2.0, 0.5]) for _ in range(4)]
        found.append((losses, list(model.parameters())))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


# ----------------------------------------------------------------------------------------------------- whatever is raised


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("block", [0, 1, BLOCKS - 1])
@pytest.mark.parametrize("kind", [Recording, Late])
def test_an_exception_leaves_no_fill_in_flight(error: Any, block: int, kind: Any, monkeypatch) -> None:
    lanes, model, twin = lanes_of(monkeypatch, kind), toy(torch.bfloat16), toy(torch.bfloat16)
    opt, other = prefetching(model), prefetching(twin, prefetch=False)
    opt.step(model), other.step(twin)
    state = State(model)

    def fail(*_: Any) -> None:
        raise error("in a block")

    handle = model.layers[block].inner.register_forward_hook(fail)
    with pytest.raises(error, match="in a block"):
        opt.step(model)
    handle.remove()
    state.clean()
    settled(lanes)
    for _ in range(2):
        assert torch.equal(opt.step(model), other.step(twin))
    settled(lanes)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_ctrl_c_at_many_lines_of_a_step(monkeypatch) -> None:
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    lanes, model = lanes_of(monkeypatch, Late), toy(torch.bfloat16)
    state, outcomes = State(model), set()

    def made() -> Any:
        opt = prefetching(model)
        opt.step(model)
        for (_, _, p), value in zip(state.entries, state.values, strict=True):
            p.data.copy_(value)
        return opt

    total = step_with_signal_at(-1, model, made())
    after = State(model).values
    for line in range(1, total + 1, 17):
        opt = made()
        step_with_signal_at(line, model, opt)
        state.in_place()
        assert not any(lane.in_flight for lane in lanes)
        now = State(model).values
        done = all(torch.equal(a, b) for a, b in zip(now, after, strict=True))
        outcomes.add(done)
        assert opt.counters["steps"] == 1 + done, line
        if not done:
            state.clean()
    signal.signal(signal.SIGINT, old)
    assert outcomes == {True, False}


# ------------------------------------------------------------------------------------------------ what does not change


def test_a_state_and_a_journal_know_nothing_of_it(tmp_path) -> None:
    """Runs go on with it and without, either way."""
    files, ends = [], []
    for i, (first, then) in enumerate([(False, False), (True, False), (False, True)]):
        base, path = toy(torch.bfloat16), tmp_path / f"{i}.journal"
        model, twin = copy.deepcopy(base), copy.deepcopy(base)
        opt = prefetching(model, prefetch=first, seed=3)
        with journal.write(opt, path):
            opt.step(model), opt.step(model)
        assert "prefetch" not in str(opt.state_dict()["zokern"])
        again = prefetching(twin, prefetch=then, seed=3)
        with journal.resume(again, path) as done:
            assert done == 2
            again.step(twin), again.step(twin)
        other = prefetching(model, prefetch=then, seed=3)
        other.load_state_dict(opt.state_dict())
        other.step(model), other.step(model)
        journal.replay(path, base)
        files.append(path.read_bytes())
        ends += [list(one.parameters()) for one in (base, model, twin)]
    assert files[0] == files[1] == files[2]
    for weights in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, ends[0], strict=True))

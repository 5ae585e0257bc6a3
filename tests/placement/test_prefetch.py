"""prefetch=True: a block's scratch is filled beside the block before. Same bits, one scratch more, events in order."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.methods import METHODS
from tests.models import BLOCKS, Toy, seeded, toy
from tests.pairs import pairs
from tests.placement import side_streams
from tests.placement.side_streams import Late, Recording
from tests.placement.streaming import State, TwoStacks, run
from tests.placement.test_pipelined import run as steps_of
from tests.placement.test_pipelined import same
from tests.placement.test_stream_handles import HANDLED
from tests.placement.test_stream_refuses import REFUSED
from zokern import journal
from zokern.placement.outside import OutsideItsBlock
from zokern.placement.prefetched import Prefetched
from zokern.placement.units import extra_bytes

DTYPES = [torch.float32, torch.bfloat16]
KINDS = pytest.mark.parametrize("kind", [None, Recording, Late])


def lanes_of(monkeypatch: pytest.MonkeyPatch, kind: type[Recording] | None) -> list[Recording]:
    return [] if kind is None else side_streams.use(monkeypatch, kind)


def settled(lanes: list[Recording]) -> None:
    for one in lanes:
        assert not one.unordered
        assert not one.in_flight


def prefetching(model: nn.Module, **options: Any) -> Any:
    return zokern.MeZO(model, 1e-2, **{"eps": 1e-2, "placement": "stream", "prefetch": True, **options})


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


class Turning(Toy):
    """Its blocks run in orders that change from forward to forward, some of them again, all of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def run(self, x: Tensor) -> Tensor:
        orders = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3] * 2, [0, 1, 2, 3], [0, 0, 1, 1, 2, 3, 3], [2, 0, 3, 1, 0]]
        order = orders[self.forwards % len(orders)]
        self.forwards += 1
        for i in order:
            x = self.layers[i](x)
        return x


@KINDS
def test_another_order_in_each_forward(kind: Any, monkeypatch) -> None:
    one, losses, plain = run(Turning, "stream", torch.bfloat16, steps=7)
    lanes = lanes_of(monkeypatch, kind)
    two, others, opt = run(Turning, "stream", torch.bfloat16, steps=7, prefetch=True)
    assert all(torch.equal(a, b) for a, b in zip(losses, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    settled(lanes)
    size = 2 * sum(p.numel() for p in one.layers[0].parameters())
    in_vain = (opt.counters["elements_moved"] - plain.counters["elements_moved"]) / size
    assert in_vain == int(in_vain) > 0  # what was filled and not called is counted
    assert opt.counters["passes"] == plain.counters["passes"]


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


def test_blocks_left_out_are_foreseen_by_the_order_of_the_list(monkeypatch) -> None:
    """LeZO has other blocks in each step: from the second on each is filled while the one before runs."""
    (lanes, model) = lanes_of(monkeypatch, Recording), toy()
    opt = prefetching(model, layers=zokern.RandomBlocks(1))
    opt.step(lambda: model() + model())
    side_streams.look_at(model.layers, lanes)
    for _ in range(3):
        lanes[0].log.clear()
        opt.step(lambda: model() + model())
        log = [what for _, what in lanes[0].log]
        assert [log[i + 3] for i, what in enumerate(log) if what == "perturbs"] == ["records " + log[i + 3][8:]
            for i, what in enumerate(log) if what == "perturbs"]  # fmt: skip
        assert log.count("fills") == 2 * 2 * 3


# ---------------------------------------------------------------------------------------------------------------- events


def test_the_order_of_events(monkeypatch) -> None:
    lanes, model = lanes_of(monkeypatch, Recording), toy()
    side_streams.look_at(model.layers, lanes)
    opt = prefetching(model)
    opt.step(model)
    first, lanes[0].log = lanes[0].log, []
    before = lanes[0].events
    opt.step(model)

    def ahead(event: int) -> list[tuple[str, str]]:
        return [("side", "waits for compute"), ("side", "fills"), ("side", f"records {event}")]

    expected: list[tuple[str, str]] = []
    for forward in range(2):
        event = before + BLOCKS * forward
        expected += [("compute", "perturbs"), *ahead(event + 1)]  # what lies outside; the first block
        for i in range(BLOCKS):
            expected += [("compute", f"waits for {event + i + 1}")]
            expected += ahead(event + i + 2) if i + 1 < BLOCKS else []
            expected += [("compute", f"runs {i}")]
        expected += [
            ("compute", "joins"),
            ("side", f"records {event + BLOCKS}"),
            ("compute", f"waits for {event + BLOCKS}"),
        ]
    assert lanes[0].log == [*expected, ("compute", "updates")]
    alone = first.index(("compute", "runs 0"))
    assert first[alone - 4 : alone] == [*ahead(1), ("compute", "waits for 1")]  # filled when it was called


class FakeStream:
    """Of torch.cuda's streams, what a lane asks for."""

    def __init__(self, name: Any = "side") -> None:
        self.name = "side" if isinstance(name, torch.device) else name

    def wait_stream(self, other: FakeStream) -> None:
        LOG.append(f"{self.name} waits for stream {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        LOG.append(f"{self.name} waits for event of {event.of}")


class FakeEvent:
    def record(self, stream: FakeStream) -> None:
        self.of = stream.name
        LOG.append(f"{self.of} records")


LOG: list[str] = []


def test_what_a_lane_asks_of_cuda(monkeypatch) -> None:
    """Waits and records alone: no query, no synchronisation. The side stream waits first, as a capture asks for."""
    from zokern.placement import beside

    now = [FakeStream("main")]

    @contextlib.contextmanager
    def inside(stream: FakeStream) -> Any:
        before, now[0] = now[0], stream
        yield
        now[0] = before

    LOG.clear()
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))
    both = beside.Beside()
    done = both.do([device], lambda: LOG.append(f"work on {now[0].name}"))
    both.wait(done)
    assert LOG == ["side waits for stream main", "work on side", "side records", "main waits for event of side"]
    LOG.clear()
    both.join()
    both.join()  # there is nothing more
    assert LOG == ["side records", "main waits for event of side"]

    def broken() -> None:
        now[0] = both.lanes[device].side  # a signal came while the stream was being changed
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with pytest.raises(KeyboardInterrupt):
        both.do([device], broken)
    LOG.clear()
    both.join()
    assert (now[0].name, LOG) == ("main", ["side records", "main waits for event of side"])


def test_a_stream_that_says_less_than_the_exception_before_it(monkeypatch) -> None:
    """A capture that the closure has broken takes no events."""
    lanes, model = lanes_of(monkeypatch, Recording), toy()
    opt = prefetching(model)
    opt.step(model)

    def broken() -> Any:
        model()
        monkeypatch.setattr(
            Recording, "record", lambda self: (_ for _ in ()).throw(RuntimeError("capture invalidated"))
        )
        raise ValueError("from the closure")

    with pytest.raises(ValueError, match="from the closure"):
        opt.step(broken)
    monkeypatch.undo()
    settled(lanes)


# ------------------------------------------------------------------------------------- memory, stand-ins, what is refused


@pytest.mark.parametrize("build", [Toy, TwoStacks])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_memory_is_what_is_said(build: Any, dtype: Any) -> None:
    """The largest block's once more than stream's."""
    model, plain = seeded(build, dtype), seeded(build, dtype)
    opt, other = prefetching(model), prefetching(plain, prefetch=False)
    addresses = set()
    for _ in range(3):
        opt.step(model), other.step(plain)
        memory = opt._placement.memory()
        addresses.add(tuple(map(Tensor.data_ptr, memory)))
        assert sum(pool.nbytes for pool in memory) == extra_bytes(model, prefetch=True)
        scratch = sum(pool.nbytes for pool in other._placement.scratches[0].pools.values())
        assert extra_bytes(model, prefetch=True) == extra_bytes(model) + scratch
        assert scratch >= max(sum(p.nbytes for p in block.parameters()) for block in model.layers)
    assert len(addresses) == 1
    assert zokern.check(opt, model).cost.memory["stream"] == extra_bytes(model, prefetch=True)


def test_a_block_that_is_filled_ahead_cannot_be_read() -> None:
    model, seen = toy(), []

    def look(block: nn.Module, *_: Any) -> None:
        seen.append([isinstance(layer.gain, OutsideItsBlock) for layer in model.layers])
        assert torch.equal(model.state_dict()["layers.1.gain"], clean)
        assert not torch.equal(block.gain, clean)

    clean = model.layers[1].gain.detach().clone()
    model.layers[1].inner.register_forward_hook(lambda *_: look(model.layers[1]))
    opt = prefetching(model, lr=0.0) if False else zokern.MeZO(model, 0.0, placement="stream", prefetch=True)
    for _ in range(2):
        opt.step(model)
    assert seen == [[True, False, True, True]] * 4


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("kind", [None, Late])
def test_refused_by_name(build: Any, message: str, after: int, kind: Any, monkeypatch) -> None:
    """In the first forward, and where blocks are filled ahead: after a step of a model that does nothing of the kind."""
    lanes, model = lanes_of(monkeypatch, kind), seeded(build, torch.bfloat16)
    opt = prefetching(model)
    if after:
        bad = type(model), type(model.layers[0])
        model.run, blocks = (lambda x: Toy.run(model, x)), [type(layer) for layer in model.layers]
        for layer in model.layers:
            layer.__class__ = toy().layers[0].__class__
        opt.step(model)
        del model.run
        for layer, cls in zip(model.layers, blocks, strict=True):
            layer.__class__ = cls
        assert (type(model), type(model.layers[0])) == bad
    state = State(model)
    with pytest.raises(RuntimeError, match=message + r"[\s\S]*placement='shadow'"):
        opt.step(model)
    for handle in [h for layer in model.layers for h in list(layer._forward_hooks)]:  # the model's own, of the test
        for layer in model.layers:
            layer._forward_hooks.pop(handle, None)
    for (module, name, p), value in zip(state.entries, state.values, strict=True):
        assert module._parameters[name] is p or name == "gain"
        assert torch.equal(p, value)
    assert opt.counters["steps"] == after
    settled(lanes)


class KeepsAView(Toy):
    """A view of the first block's weights is held until its scratch is wanted again: while the second block begins."""

    def run(self, x: Tensor) -> Tensor:
        seen = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            seen.append(i)
            if i == 0 and self.holds:
                self.view = self.held.t()
        return x


def test_a_view_is_refused_when_its_scratch_is_wanted_again(monkeypatch) -> None:
    model = seeded(KeepsAView)
    model.holds = False
    model.layers[0].inner.register_forward_hook(lambda inner, *_: model.__dict__.__setitem__("held", inner.weight))
    ran: list[int] = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    opt = prefetching(model)
    opt.step(model)
    model.holds = True
    ran.clear()
    with pytest.raises(RuntimeError, match=r"view of the perturbed weights of layers\.0 is still held"):
        opt.step(model)
    assert ran == [0]  # the third block would be written where the first was, beside the second


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"placement": "inplace"}, "placement='inplace'"),
        ({"placement": "shadow"}, "placement='shadow'"),
        ({"placement": "auto"}, "placement='inplace'"),
        ({"placement": "forward", "distribution": "lowrank:1"}, "placement='forward'"),
        ({"placement": "forward", "distribution": "lowrank:1", "fold_every": 2}, "placement='forward'"),
        ({"placement": zokern.placement.Stream()}, "Stream object"),
    ],
)
def test_refused_where_nothing_goes_block_by_block(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=rf"prefetch=True .*{word}.* use placement='stream'"):
        zokern.MeZO(toy(), 1e-2, prefetch=True, **options)
    with pytest.raises(ValueError, match=r"placement='stream'.*pass the nn\.Module"):
        zokern.MeZO(toy().parameters(), 1e-2, prefetch=True, placement="stream")
    opt = zokern.MeZO(toy(torch.bfloat16), 1e-2, prefetch=True)  # auto, which is stream here
    assert opt.placement == "stream"
    with pytest.raises(ValueError, match="prefetch cannot change"):
        opt.prefetch = False
    assert opt.prefetch


def test_auto_that_gives_way_says_that_nothing_is_filled_ahead(capsys) -> None:
    model = seeded(REFUSED["early exit"][0], torch.bfloat16)
    opt = zokern.MeZO(model, 1e-2, prefetch=True)
    opt.step(model)
    assert opt.placement == "shadow"
    assert "goes on with 'shadow', where prefetch=True does nothing (" in capsys.readouterr().err


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
    import signal

    from tests.placement.test_stream_clean import step_with_signal_at

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
    ends = []
    for first, then in ((False, False), (True, False), (False, True)):
        model, path = toy(torch.bfloat16), tmp_path / f"{first}{then}.journal"
        opt = prefetching(model, prefetch=first, seed=3)
        with journal.write(opt, path):
            opt.step(model), opt.step(model)
        saved = opt.state_dict()
        assert "prefetch" not in str(saved["zokern"])
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        opt = prefetching(model, prefetch=then, seed=3)
        opt.load_state_dict(torch.load(buffer, weights_only=True))
        with journal.write(opt, path):  # goes on with what is there
            opt.step(model), opt.step(model)
        other = toy(torch.bfloat16)
        journal.replay(path, other)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
        ends.append((path.read_bytes(), list(model.parameters())))
    for content, weights in ends[1:]:
        assert len(content) == len(ends[0][0])
        assert all(torch.equal(a, b) for a, b in zip(weights, ends[0][1], strict=True))

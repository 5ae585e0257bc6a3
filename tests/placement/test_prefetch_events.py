"""prefetch=True: who waits for whom, how much memory it takes, and what is refused by name."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import BLOCKS, Block, Toy, seeded, toy
from tests.placement import side_streams
from tests.placement.side_streams import Late, Recording, lanes_of, prefetching, settled
from tests.placement.streaming import TwoStacks
from tests.placement.test_stream_refuses import REFUSED
from zokern.placement import beside
from zokern.placement.outside import OutsideItsBlock
from zokern.placement.stream import extra_bytes

JOIN = ["joins", "records", "waits for"]


def test_the_order_of_events(monkeypatch) -> None:
    lanes, model = lanes_of(monkeypatch, Recording), toy()
    side_streams.look_at(model, lanes)
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
        expected += [("compute", "embeds")]
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
    with pytest.raises(KeyboardInterrupt):
        both.do([device], broken)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    LOG.clear()
    both.do([device], lambda: None)  # of a closure that goes on
    assert (now[0].name, LOG) == ("main", ["side waits for stream main", "side records"])


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


def test_blocks_left_out_are_foreseen_by_the_order_of_the_list(monkeypatch) -> None:
    """LeZO has other blocks in each step: from the second on each is filled while the one before runs."""
    (lanes, model) = lanes_of(monkeypatch, Recording), toy()
    opt = prefetching(model, layers=zokern.RandomBlocks(1))
    opt.step(lambda: model() + model())
    side_streams.look_at(model, lanes)
    fill = ["waits for compute", "fills", "records"]
    for _ in range(3):
        lanes[0].log.clear()
        opt.step(lambda: model() + model())
        log = [re.sub(r" \d+$", "", what) for _, what in lanes[0].log]
        one = [*["waits for", *fill, "runs"] * (BLOCKS - 2), "waits for"]  # of its forwards
        probe = ["perturbs", *fill, "embeds", *one, *fill, "runs", "embeds", *one, "runs", *JOIN]
        assert log == [*probe * 2, "updates"]


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
    opt = prefetching(model, lr=0.0)
    for _ in range(2):
        opt.step(model)
    assert seen == [[True, False, True, True]] * 4


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize(("after", "kind"), [(0, None), (1, None), (1, Late)])
def test_refused_by_name(build: Any, message: str, after: int, kind: Any, monkeypatch) -> None:
    """In the first forward, and where blocks are filled ahead: after a step of a model that does nothing of the kind."""
    lanes, model = lanes_of(monkeypatch, kind), seeded(build, torch.bfloat16)
    opt = prefetching(model)
    if after:
        blocks = [type(layer) for layer in model.layers]
        model.run = functools.partial(Toy.run, model)
        for layer in model.layers:
            layer.__class__ = Block
        opt.step(model)
        del model.run
        for layer, cls in zip(model.layers, blocks, strict=True):
            layer.__class__ = cls
    before = [(p, p.detach().clone()) for p in model.parameters()]
    with pytest.raises(RuntimeError, match=message + r"[\s\S]*placement='shadow'"):
        opt.step(model)
    for p, (own, value) in zip(model.parameters(), before, strict=True):
        assert p is own
        assert torch.equal(p, value)
    assert opt.counters["steps"] == after
    settled(lanes)


def test_a_view_is_refused_when_its_scratch_is_wanted_again() -> None:
    model, ran, held = toy(), [], []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    opt = prefetching(model)
    opt.step(model)
    ran.clear()
    model.layers[0].inner.register_forward_hook(lambda inner, *_: held.append(inner.weight.t()))
    with pytest.raises(RuntimeError, match=r"view of the perturbed weights of layers\.0 is still held"):
        opt.step(model)
    assert ran == [0]  # the third block would be written where the first was, while the second runs


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


def test_it_may_be_changed_between_steps() -> None:
    model = toy(torch.bfloat16)
    opt, sizes = prefetching(model, prefetch=False), []
    for on in (False, True, True, False):
        opt.prefetch = on
        opt.step(model)
        sizes.append(sum(pool.nbytes for pool in opt._placement.memory()))
    assert sizes == [extra_bytes(model, prefetch=on) for on in (False, True, True, False)]

    def closure() -> Tensor:
        opt.prefetch = True
        return model()

    with pytest.raises(RuntimeError, match="prefetch"):
        opt.step(closure)
    assert opt.prefetch is False
    for placement, advice in (("shadow", "use placement='stream'"), (zokern.placement.Stream(), "by its name")):
        other = zokern.MeZO(toy(), 1e-2, placement=placement)
        before = other._placement
        with pytest.raises(ValueError, match=advice):
            other.prefetch = True
        assert other.prefetch is False
        other.prefetch = False
        assert other._placement is before


def test_auto_that_gives_way_says_that_nothing_is_filled_ahead(capsys) -> None:
    model = seeded(REFUSED["early exit"][0], torch.bfloat16)
    opt = zokern.MeZO(model, 1e-2, prefetch=True)
    opt.step(model)
    assert opt.placement == "shadow"
    assert "goes on with 'shadow', where prefetch=True does nothing (" in capsys.readouterr().err

"""GraphedStep: a captured step has the bits of an eager one. Its rules are tested on the CPU with an emulated graph."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zokern
from tests import emulated_graph
from tests.emulated_graph import EmulatedGraph
from tests.methods import CASES, METHODS, Case
from tests.models import Net
from tests.optim.test_buffers import BLOCKS, copies, made
from tests.placement import side_streams
from tests.placement.side_streams import Late
from tests.placement.test_pipelined import same
from zokern.graphs import broken, cuda
from zokern.graphs import step as graphed
from zokern.noise import derive_seed, derive_seeds
from zokern.placement.units import Scratch

STEPS = 5


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "SUPPORTED", ("cuda", "cpu"))
    monkeypatch.setattr(graphed, "new_graph", EmulatedGraph)
    monkeypatch.setattr(broken, "INSIDE", (*broken.INSIDE, emulated_graph.__file__))
    # The emulation holds on to every tensor that it has seen, views of stream's scratch among them.
    monkeypatch.setattr(Scratch, "refuse_views", lambda self: None)


def batches(number: int = STEPS, bad: int | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for i in range(number):
        tokens = torch.randint(0, 11, (6, 5), generator=generator)
        labels = torch.randint(0, 3, (6,), generator=generator)
        made.append({"tokens": tokens, "labels": labels, "scale": torch.tensor(float("nan") if i == bad else 1.0)})
    return made


def make(case: Case, placement: str, dtype: torch.dtype, device: str = "cpu", **options):
    """A model, and an optimizer with two groups of different numbers where it takes them."""
    torch.manual_seed(2)
    model = Net().to(dtype).to(device).eval()
    made = case.settings | options
    opt = case.cls(model, case.rate, placement=placement, seed=5, weight_decay=0.01, **made)
    sign = -1.0 if case.climbs else 1.0

    def closure(batch) -> Tensor:
        return sign * batch["scale"] * nn.functional.cross_entropy(model(batch["tokens"]).float(), batch["labels"])

    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
    return model, opt, closure, scheduler


def eager(case, placement, dtype, data, **options):
    model, opt, closure, scheduler = make(case, placement, dtype, **options)
    losses = []
    for batch in data:
        losses.append(opt.step(lambda batch=batch: closure(batch)))
        scheduler.step()
    return model, opt, torch.stack(losses)


def replayed(case, placement, dtype, data, **options):
    model, opt, closure, scheduler = make(case, placement, dtype, **options)
    step = zokern.GraphedStep(opt, closure, data[0])
    losses = []
    for batch in data:
        losses.append(step(batch))
        scheduler.step()
    return model, opt, torch.stack(losses)


@CASES
@pytest.mark.parametrize(
    ("placement", "dtype"),
    [("inplace", torch.float32), ("inplace", torch.bfloat16), ("shadow", torch.float16), ("stream", torch.bfloat16)],
    ids=["inplace-float32", "inplace-bfloat16", "shadow-float16", "stream-bfloat16"],
)
def test_the_bits_are_those_of_eager_steps(emulated, case: Case, placement: str, dtype: torch.dtype) -> None:
    if case.method == "mezo-greedy" and placement == "inplace":
        pytest.skip("an eager step on the CPU knows the best seed, and moves less between two directions that are one")
    data = batches()
    a, b = eager(case, placement, dtype, data), replayed(case, placement, dtype, data)
    same(a, b)
    assert a[1].counters == b[1].counters
    assert torch.equal(a[1].metrics["projected_gradient"], b[1].metrics["projected_gradient"])
    before = make(case, placement, dtype)[0]
    assert not torch.equal(before.head.weight, b[0].head.weight)


@pytest.mark.parametrize(
    ("name", "pipelined", "backwards"),
    [
        ("mezo", True, False),
        ("mezo", True, True),
        *((n, False, False) for n in ("hizoo-3", "helene", "gv-curved", "fzoo")),
    ],
)
def test_blocks_that_are_filled_ahead_are_captured(
    emulated, name: str, pipelined: bool, backwards: bool, monkeypatch
) -> None:
    """Each capture's side stream begins by a wait, which makes it a part of the capture, and is joined before its end."""
    monkeypatch.setattr(Net, "backwards", backwards)
    case, data, whole = METHODS[name], batches(), []
    plain, ahead = (eager(case, "stream", torch.bfloat16, data, prefetch=on) for on in (False, True))
    lanes, capture = side_streams.use(monkeypatch, Late), EmulatedGraph.capture

    def watched(graph: EmulatedGraph, work) -> None:
        for lane in lanes:
            lane.log.clear()
        capture(graph, work)
        whole.append([line for lane in lanes for line in lane.log])

    monkeypatch.setattr(EmulatedGraph, "capture", watched)
    graph = replayed(case, "stream", torch.bfloat16, data, prefetch=True, pipelined=pipelined)
    same(plain, ahead)
    same(plain, graph)
    assert pipelined or plain[1].counters == graph[1].counters
    assert len(whole) == (2 if pipelined or name == "helene" else 1)
    for log in whole:
        side = [what for stream, what in log if stream == "side"]
        assert side[:2] == ["waits for compute", "fills"]
        assert log[-3:-1] == [
            ("side", side[-1]),
            ("compute", f"waits for {side[-1].split()[-1]}"),
        ]  # and then the update
        assert ("compute", "joins") in log[-4:]
        assert log[-1] == ("compute", "updates")
    for lane in lanes:
        assert not lane.unordered


LOW_RANK = [
    (name, case) for name, case in METHODS.items() if not case.settings.get("smoothing") and "hizoo" not in case.method
]


@pytest.mark.parametrize("case", [c for _, c in LOW_RANK], ids=[n for n, _ in LOW_RANK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_inside_the_forward_are_captured(emulated, case: Case, dtype: torch.dtype) -> None:
    """Factors and scales are made anew in buffers that stay where they are, from seeds that the device has."""
    data, low = batches(), {"distribution": zokern.LowRank(1)}
    a, b = eager(case, "forward", dtype, data, **low), replayed(case, "forward", dtype, data, **low)
    same(a, b)
    assert a[1].counters == b[1].counters
    assert not torch.equal(make(case, "forward", dtype, **low)[0].head.weight, b[0].head.weight)


@pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
@pytest.mark.parametrize("name", ["BatchNorm1d", "spectral_norm", "in place", "batch_norm"])
def test_buffers_are_left_as_they_were(emulated, name: str, placement: str) -> None:
    """In each launch as they were before it, also where they have changed since the capture."""
    (model, x), (other, _) = (made(BLOCKS[name], torch.float32) for _ in range(2))
    opt, plain = (zokern.MeZO(m, 1e-2, placement=placement, seed=3) for m in (model, other))
    at_first = copies(model)
    step = zokern.GraphedStep(opt, model, x)
    assert all(torch.equal(b, at_first[n]) for n, b in model.named_buffers())
    for t in range(3):
        batch = x + t
        with torch.no_grad():
            model(batch), other(batch)
        before = copies(model)
        assert any(not torch.equal(b, at_first[n]) for n, b in before.items())
        step(batch)
        plain.step(lambda batch=batch: other(batch))
        assert [n for n, b in model.named_buffers() if not torch.equal(b, before[n])] == []
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_cumulative_average_cannot_be_captured_and_is_left_as_it_was(emulated) -> None:
    """Its forward asks for the number of batches."""
    model, x = made(BLOCKS["BatchNorm1d, cumulative"], torch.float32)
    before = copies(model)
    opt = zokern.MeZO(model, 1e-2)
    with pytest.raises(RuntimeError, match=r"must not wait for the device.*optimizer\.step"):
        zokern.GraphedStep(opt, model, x)
    opt.step(lambda: model(x))  # the remedy
    assert opt.counters["steps"] == 1
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("name", ["mezo-adam", "hizoo", "helene", "greedy"])
def test_a_skipped_step(emulated, name: str) -> None:
    data = batches(bad=2)
    runs = []
    for way in (eager, replayed):
        with pytest.warns(zokern.ZokernWarning):
            runs.append(way(METHODS[name], "shadow", torch.bfloat16, data))
    (_, a, losses), (_, b, losses2) = runs
    assert torch.equal(losses.nan_to_num(9.0), losses2.nan_to_num(9.0))
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert a.skipped_steps == b.skipped_steps == 1
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(p, q)


def dropped_out(batch, model: Net) -> Tensor:
    """A loss that draws from the global generator, as dropout does in training mode."""
    return nn.functional.cross_entropy(nn.functional.dropout(model(batch["tokens"]).float(), 0.5), batch["labels"])


def test_the_global_generator_is_left_where_it_was(emulated) -> None:
    """So that a closure with dropout draws what it would have drawn in eager steps."""
    data, runs = batches(), []
    for captured in (False, True):
        model, opt, _, _ = make(METHODS["mezo"], "shadow", torch.float32)
        opt.param_groups[0]["lr"] = 1e-5  # other masks on the two sides make large differences
        opt.paired_randomness = False
        torch.manual_seed(3)
        if captured:
            step = zokern.GraphedStep(opt, partial(dropped_out, model=model), data[0])
            losses = [step(batch) for batch in data]
        else:
            losses = [opt.step(lambda m=model, b=batch: dropped_out(b, m)) for batch in data]
        runs.append((model, opt, torch.stack(losses)))
    same(*runs)


def test_the_constructor_changes_nothing(emulated) -> None:
    for name in ("mezo-adam", "helene"):
        model, opt, closure, _ = make(METHODS[name], "inplace", torch.float32)
        opt.step(lambda closure=closure: closure(batches()[0]))
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
        metrics = opt.metrics
        zokern.GraphedStep(opt, closure, batches()[0])
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        after = opt.state_dict()
        for key, kept in state["state"].items():
            assert all(torch.equal(v, after["state"][key][k]) for k, v in kept.items())
        assert after["zokern"] == state["zokern"]
        assert opt.metrics is metrics


def test_eager_and_captured_steps_take_turns(emulated) -> None:
    data = batches(6)
    for name in ("mezo-adam", "helene"):
        whole = eager(METHODS[name], "shadow", torch.bfloat16, data)
        model, opt, closure, scheduler = make(METHODS[name], "shadow", torch.bfloat16)
        graph, losses = zokern.GraphedStep(opt, closure, data[0]), []
        for i, batch in enumerate(data):
            if i % 3 == 1:
                losses.append(opt.step(lambda closure=closure, batch=batch: closure(batch)))
            else:
                losses.append(graph(batch))
            scheduler.step()
        same(whole, (model, opt, torch.stack(losses)))


def test_groups_have_their_own_numbers(emulated) -> None:
    results = []
    for captured in (False, True):
        torch.manual_seed(2)
        model = Net()
        groups = [
            {"params": model.layers.parameters(), "lr": 0.1, "eps": 1e-2},
            {"params": [*model.embedding.parameters(), *model.head.parameters()], "weight_decay": 0.1},
        ]
        opt = zokern.MeZO(groups, torch.tensor(0.05), num_samples=2)
        data = batches()

        def closure(batch, model=model) -> Tensor:
            return nn.functional.cross_entropy(model(batch["tokens"]), batch["labels"])

        step = (
            zokern.GraphedStep(opt, closure, data[0]) if captured else lambda b, o=opt, c=closure: o.step(lambda: c(b))
        )
        for batch in data:
            step(batch)
            opt.param_groups[0]["eps"] *= 1.5
            opt.param_groups[1]["lr"] = opt.param_groups[1]["lr"] * 0.5
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_seeds_on_the_device_are_those_of_the_host() -> None:
    draw = random.Random(1)
    for _ in range(50):
        run_seed, step = draw.randrange(1 << 63), draw.choice([0, 1, 17, draw.randrange(1 << 40)])
        streams = [0, 1, draw.randrange(1 << 32), 1 << 32, (1 << 32) + 2]
        got = derive_seeds(run_seed, torch.tensor(step), torch.tensor(streams))
        assert got.tolist() == [derive_seed(run_seed, step, stream) for stream in streams]


class ReadFromOutside(TorchDispatchMode):
    """Which memory that was there before do operations touch?"""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.outside: dict[int, tuple[str, StorageWeakRef]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.made:
                key = t.untyped_storage()._cdata
                self.outside.setdefault(key, (f"{func.name()}: {t.shape}", StorageWeakRef(t.untyped_storage())))
        out = func(*args, **(kwargs or {}))
        self.kept = [*getattr(self, "kept", []), out]  # so that no address comes twice
        self.made |= {t.untyped_storage()._cdata for t in tree_leaves(out) if isinstance(t, Tensor)} - set(self.outside)
        return out


def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, tuple[str, StorageWeakRef]]]:
    """What each capture from now on reads from outside."""
    captures: list[dict[int, tuple[str, StorageWeakRef]]] = []

    class Watched(EmulatedGraph):
        def capture(self, work) -> None:
            with ReadFromOutside() as seen:
                work()
            captures.append(seen.outside)

    monkeypatch.setattr(graphed, "new_graph", Watched)
    return captures


class Growing(zokern.MeZO):
    """A second kind of step with streams of seeds that the first has not."""

    def structure(self) -> bool:
        return self.counters["steps"] > 0

    def rounds(self):
        self.num_samples = 3 if self.structure() else 1
        return super().rounds()


@pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
@pytest.mark.parametrize("name", ["growing", "mezo-adam", "hizoo", "helene", "helene-by-layer"])
def test_what_a_graph_reads_is_kept(emulated, name: str, placement: str, monkeypatch) -> None:
    """All memory from outside of each capture is there after the next kind of step has been captured, and eager steps."""
    captures = watched(monkeypatch)
    torch.manual_seed(2)
    model = Net().bfloat16()
    case = METHODS.get(name, METHODS["mezo"])
    options = case.settings
    kind = Growing if name == "growing" else case.cls
    opt = kind(model, 1e-3, placement=placement, **options)
    data = batches()

    def closure(batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["tokens"]).float(), batch["labels"])

    step = zokern.GraphedStep(opt, closure, data[0])
    step(data[0])
    opt.step(lambda: closure(data[1]))
    step(data[1])
    step(data[2])
    gc.collect()
    assert len(captures) == (2 if name in ("growing", "helene") else 1)
    freed = [what for outside in captures for what, storage in outside.values() if storage.expired()]
    assert freed == []
    assert len(captures[0]) > 10
    assert step.optimizer is opt


# ---------------------------------------------------------------------------------------------------------- bad input


def test_refused_on_the_cpu() -> None:
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    with pytest.raises(ValueError, match=r"the parameters are on cpu.*use optimizer\.step"):
        zokern.GraphedStep(opt, closure, batches()[0])


ALL_BLOCKS = zokern.RandomBlocks(3, blocks=["embedding", "layers", "head"])


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        (
            "mezo",
            {"layers": zokern.RandomBlocks(1), "placement": "stream"},
            "layers leaves out .* placement='stream' see",
        ),
        ("mezo", {"layers": ALL_BLOCKS}, "layers leaves out everything"),
        ("mezo-adamezo", {"layers": zokern.RandomBlocks(1)}, "layers leaves out .* looks back on those of others"),
        (
            "mezo",
            {"layers": zokern.RandomBlocks(1), "distribution": zokern.LowRank(1)},
            "layers leaves out .* low rank",
        ),
        ("mezo", {"layers": zokern.RandomBlocks(1), "pipelined": True}, "layers leaves out .* pipelined=True"),
    ],
)
def test_refused_methods(emulated, name, options, word) -> None:
    placement = options.get("placement", "shadow")
    more = {key: value for key, value in options.items() if key != "placement"}
    _, opt, closure, _ = make(METHODS[name], placement, torch.float32, **more)
    with pytest.raises(ValueError, match=rf"{word}.*use optimizer\.step"):
        zokern.GraphedStep(opt, closure, batches()[0])


def test_arguments(emulated) -> None:
    model, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    with pytest.raises(TypeError, match="optimizer must be one of zokern's, got SGD"):
        zokern.GraphedStep(torch.optim.SGD(model.parameters(), 0.1), closure, batches()[0])
    with pytest.raises(TypeError, match="closure must be a function"):
        zokern.GraphedStep(opt, None, batches()[0])
    with pytest.raises(ValueError, match="sample_batch has no tensor"):
        zokern.GraphedStep(opt, closure, {"tokens": 3})


@pytest.mark.parametrize("what", ["item", "host number", "raises"])
def test_a_closure_that_cannot_be_captured(emulated, what) -> None:
    model, opt, closure, _ = make(METHODS["hizoo"], "inplace", torch.float32)
    before = copy.deepcopy(model.state_dict())

    def bad(batch) -> Tensor:
        loss = closure(batch)
        if what == "item":
            return loss * float(loss.item())
        if what == "raises":
            raise RuntimeError("on purpose")
        return loss * torch.tensor(2.0)

    with pytest.raises(RuntimeError, match=r"could not be captured in a CUDA graph: .*optimizer\.step"):
        zokern.GraphedStep(opt, bad, batches()[0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    data = batches()
    expected = eager(METHODS["hizoo"], "inplace", torch.float32, data)
    for batch in data:
        opt.step(lambda batch=batch: closure(batch))
        opt.param_groups[0]["lr"] = expected[1].param_groups[0]["lr"]
    assert opt.counters["steps"] == STEPS


def test_a_loss_that_is_no_tensor(emulated) -> None:
    _, opt, _, _ = make(METHODS["mezo"], "inplace", torch.float32)
    with pytest.raises(TypeError, match="closure must return the loss as a tensor on cpu"):
        zokern.GraphedStep(opt, lambda batch: 1.0, batches()[0])


@pytest.mark.parametrize("what", ["group", "frozen", "moved", "loaded"])
def test_what_has_changed_since_is_noticed(emulated, what) -> None:
    model, opt, closure, _ = make(METHODS["mezo-adam"], "inplace", torch.float32)
    data = batches()
    step = zokern.GraphedStep(opt, closure, data[0])
    step(data[0])
    if what == "group":
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    elif what == "frozen":
        model.head.weight.requires_grad_(False)
    elif what == "moved":
        model.head.weight.data = model.head.weight.data.clone()
    else:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    with pytest.raises(RuntimeError, match="make a new GraphedStep"):
        step(data[1])
    assert opt.counters["steps"] == 1
    again = zokern.GraphedStep(opt, closure, data[0])
    again(data[1])


# ------------------------------------------------------------------------------------------- a capture that cannot end


class StandIns:
    """PyTorch's calls for graphs, as CUDA has them: a capture that a call has broken cannot end. `log` has what was done.
    end_fails: the capture ends with an error by itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, end_fails: bool = False) -> None:
        self.log: list[object] = []
        self.streams: list[object] = ["outer"]  # the last is current
        self.recording: list[object] = []
        self.used: list[object] = []  # pools that are yet to be released
        self.capturing = False  # as the generator sees it
        log, stand = self.log, self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                pass

        class stream:
            def __init__(self, entered: object) -> None:
                self.entered = entered

            def __enter__(self) -> None:
                self.before = stand.streams[-1]
                stand.streams.append(self.entered)

            def __exit__(self, *error: object) -> None:
                stand.streams.append(self.before)

        class graph:
            def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global") -> None:
                assert capture_error_mode == "thread_local"
                self.pool, self.within = pool, torch.cuda.stream(stream)

            def __enter__(self) -> None:
                if stand.recording:  # empty_cache
                    raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
                self.within.__enter__()
                stand.recording.append(self.pool)
                stand.used.append(self.pool)
                stand.capturing = True

            def __exit__(self, kind, error, traceback) -> None:
                if (error is not None and "not permitted" in str(error)) or (end_fails and self.pool is not None):
                    raise RuntimeError("operation failed due to a previous error during capture\nadvice\nmore of it")
                stand.recording.remove(self.pool)
                stand.used.remove(self.pool)
                stand.capturing = False
                self.within.__exit__(None, None, None)

        def end(device: int, pool: object) -> None:
            if pool not in stand.recording:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            stand.recording.remove(pool)
            log.append(("ended", device, pool))

        def zeros(*size: object, device: torch.device) -> Tensor:
            return torch.full((), 0.0)

        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.used.remove(pool), raising=False)
        monkeypatch.setattr(torch, "zeros", zeros)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "graph", graph)


GPU = torch.device("cuda", 1)


def waits() -> None:
    raise RuntimeError("the first error: operation not permitted when stream is capturing\nadvice")


def test_a_capture_that_a_call_breaks_leaves_nothing_behind(monkeypatch) -> None:
    stand = StandIns(monkeypatch)
    one = cuda.CudaGraph(GPU, "pool")
    with pytest.raises(RuntimeError, match="the first error") as raised:
        one.capture(waits)
    # A trace function that raises in an except clause, as tests of Ctrl-C have them, leaves its exception current for good.
    assert raised.value.__context__ is sys.exc_info()[1], "that the capture could not end says nothing"
    assert stand.streams[-1] == "outer"
    assert stand.log == [("ended", 1, "pool")]
    assert stand.recording == stand.used == []
    assert not stand.capturing
    assert one.graph in cuda._broken
    cuda.CudaGraph(GPU, "another pool").capture(lambda: None)
    assert stand.streams[-1] == "outer"


@pytest.mark.parametrize("breaks", [False, True], ids=["done", "broken"])
def test_what_follows_a_warm_up_waits_for_it(breaks: bool, monkeypatch) -> None:
    """Also where it raised: the weights are put back on its stream, by passes that the host does not wait for."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    def work() -> None:
        log.append("work")
        if breaks:
            waits()

    StandIns(monkeypatch)
    outer = Stream("outer")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: outer)
    with pytest.raises(RuntimeError, match="the first error") if breaks else contextlib.nullcontext():
        cuda.CudaGraph(GPU, "pool").warm_up(work)
    assert log == ["side waits for outer", "work", "outer waits for side"]


def test_the_calls_that_end_a_recording_are_there() -> None:
    """Private ones of PyTorch, which may be renamed: builds without CUDA have them by name."""
    assert hasattr(torch._C, "_cuda_endAllocateToPool")
    assert hasattr(torch._C, "_cuda_releasePool")


def test_a_capture_that_broke_holds_no_tensor_of_its_step(monkeypatch) -> None:
    StandIns(monkeypatch)
    held: list[weakref.ref[Tensor]] = []

    def work() -> None:
        made = torch.ones(3)
        held.append(weakref.ref(made))
        waits()

    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="the first error"):
            cuda.CudaGraph(GPU, "pool").capture(work)
        gone = held[0]() is None
    finally:
        gc.enable()
    assert gone


def test_a_capture_that_cannot_end_by_itself_says_so(monkeypatch) -> None:
    stand = StandIns(monkeypatch, end_fails=True)
    with pytest.raises(RuntimeError, match="operation failed due to a previous error"):
        cuda.CudaGraph(GPU, "pool").capture(lambda: None)
    assert stand.streams[-1] == "outer"
    assert stand.log == [("ended", 1, "pool")]
    assert not stand.capturing


def test_an_error_that_lets_the_capture_end_is_left_alone(monkeypatch) -> None:
    """Of the closure's own, say: PyTorch has put everything back."""
    stand = StandIns(monkeypatch)
    before = len(cuda._broken)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.CudaGraph(GPU, "pool").capture(interrupted)
    assert stand.streams[-1] == "outer"
    assert stand.log == []
    assert len(cuda._broken) == before


def test_the_next_try_has_a_pool_of_its_own(emulated, monkeypatch) -> None:
    """HELENE's second kind of step fails, and then works: the pool that the failure left is not used again."""
    pools, handles = [], iter(range(100))

    class Noting(EmulatedGraph):
        def __init__(self, device: torch.device, pool: object) -> None:
            super().__init__(device, pool)
            pools.append(pool)

    monkeypatch.setattr(graphed, "new_graph", Noting)
    monkeypatch.setattr(graphed.GraphedStep, "_new_pool", lambda self: next(handles))
    _, opt, closure, _ = make(METHODS["helene"], "inplace", torch.float32)
    reads: list[str] = []

    def sometimes(batch) -> Tensor:
        return closure(batch) * (closure(batch).item() if reads else 1.0)

    data = batches()
    step = zokern.GraphedStep(opt, sometimes, data[0])
    step(data[0])
    reads.append("yes")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="could not be captured"):
            step(data[1])
    reads.clear()
    step(data[1])
    assert pools == [0, 0, 1, 2]
    assert opt.counters["steps"] == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("\nCUDA error: one line\nCompile with `TORCH_USE_CUDA_DSA`\n"),
            r"graph: CUDA error: one line\. It came from .*test_graphed\.py:\d+ in closure: raise error\. The",
        ),
        (RuntimeError(), r"graph: RuntimeError\. It came from .*test_graphed\.py:\d+ in closure: raise error\. The"),
    ],
)
def test_an_error_is_told_in_one_line(emulated, error, said) -> None:
    _, opt, _, _ = make(METHODS["mezo"], "inplace", torch.float32)

    def closure(batch) -> Tensor:
        raise error

    with pytest.raises(RuntimeError, match=said) as raised:
        zokern.GraphedStep(opt, closure, batches()[0])
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error

"""Steps on a device never wait for it, by construction: run on PyTorch's device "meta", whose tensors have no values.

Asking one for its value, or for a copy on the host, is an error of PyTorch's own, and what goes to the device is counted.
An eager step may send numbers there if the host does not wait for their arrival; a captured one may not even do that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import zokern
from tests.late import Late
from tests.methods import METHODS, Case
from tests.models import BLOCKS, WORDS, Net
from tests.placement import side_streams
from zokern import backends, journal, sweep
from zokern.distributed.exchange import Exchange
from zokern.distributed.places import Places
from zokern.graphs.live import DeviceNumbers
from zokern.journal import behind, recording, run
from zokern.journal.signatures import Directions
from zokern.layers import RandomBlocks
from zokern.optim import agreement, parameters
from zokern.optim.agreement import Agreement
from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.batched import Sharing
from zokern.optim.flat import Flats
from zokern.optim.losses import Skips
from zokern.optim.moves import Moves
from zokern.optim.ranks import Ranks
from zokern.passes import table
from zokern.passes.operands import Operands
from zokern.placement import factors
from zokern.placement.rows import Rows

DEVICE = torch.device("meta")
PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])


class MadeFromNumbers(TorchFunctionMode):
    """Notes tensors that are made on the device from numbers of the host: PyTorch waits for their copy."""

    def __init__(self, waited: list[str]) -> None:
        super().__init__()
        self.waited = waited

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        makers = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        given = args[1] if func is Tensor.new_tensor else args[0] if args else None
        if func in makers and out.device.type == DEVICE.type and not isinstance(given, Tensor):
            self.waited.append(func.__name__)
        return out


class Transfers(TorchDispatchMode):
    """Copies between devices: all, as (from, to), and the names of those to the device that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.waited: list[str] = []
        self.made = MadeFromNumbers(self.waited)

    def __enter__(self) -> Transfers:
        self.made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.name().split(".")[0]
        source, waits = None, False
        if name == "aten::copy_":
            source, waits = args[1], not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif name == "aten::_to_copy":
            source, waits = args[0], not kwargs.get("non_blocking", False)
        if isinstance(source, Tensor) and source.device.type != out.device.type:
            self.seen.append((source.device.type, out.device.type))
            if waits and source.device.type == "cpu":
                self.waited.append(name)
        elif source is None and isinstance(out, Tensor) and out.device.type == DEVICE.type:
            # What an operation takes from the host it copies by itself, and waits: indices, and numbers of a `where`.
            flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
            hosts = [x for x in flat if isinstance(x, Tensor) and x.device.type == "cpu"]
            self.waited += [name for x in hosts if x.dim() or name == "aten::where"]
        return out


class Product(nn.Linear):
    """Has a bias, and leaves it alone."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Light(nn.Module):
    """An embedding, blocks and a head, of what PyTorch does without values in C++: the rest, as a bias, is in Python there,
    and slower than the step around it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 24)
        self.layers = nn.ModuleList(Product(24, 24) for _ in range(BLOCKS))
        self.head = Product(24, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def on_device(
    case: Case, placement: str, monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module] = Light, **options: Any
) -> tuple[nn.Module, ZerothOrderOptimizer]:
    model = make().bfloat16().to(DEVICE)
    monkeypatch.setattr(parameters, "check_parameter", lambda p, name: None)  # it refuses tensors without storage
    monkeypatch.setattr(backends, "choose", lambda name, device: backends.module("cuda"))
    monkeypatch.setattr(Operands, "tables", lambda self: [])  # numbers are sent, and nothing is launched
    monkeypatch.setattr(sweep, "num_modes", lambda: 0)  # those of these tests look at transfers alone
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: t)  # what the copies are made from
    # The count of skipped steps comes to the host by a CUDA event, in its own time.
    monkeypatch.setattr(Skips, "look", lambda self: None)
    monkeypatch.setattr(Moves, "look", lambda self: None)  # the count of large steps likewise
    monkeypatch.setattr(Flats, "look", lambda self: None)
    return model, case.cls(model, 1e-3, placement=placement, **(case.settings | options))


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)).float().sum()


def captured_moves_nothing(model: nn.Module, opt: ZerothOrderOptimizer) -> None:
    """A step of the kind that is captured, after two that are tried, as GraphedStep does them: what is kept is there."""
    live = DeviceNumbers(opt.seed, 1, len(opt.schedule(0)), DEVICE)

    def step() -> None:
        live.begin()
        opt.step_with(live, lambda: loss_of(model))

    step()
    step()
    with Transfers() as transfers:
        step()
    assert transfers.seen == []


@PLACEMENTS
@pytest.mark.parametrize("case", METHODS.values(), ids=list(METHODS))
def test_an_eager_step_asks_the_device_for_nothing(case: Case, placement: str, monkeypatch) -> None:
    model, opt = on_device(case, placement, monkeypatch)
    with Transfers() as transfers:
        for _ in range(3):
            loss = opt.step(lambda: loss_of(model))
    assert loss.device == DEVICE
    assert set(transfers.seen) == {("cpu", "meta")}
    assert transfers.waited == []


@pytest.mark.parametrize("case", METHODS.values(), ids=list(METHODS))
def test_a_step_after_a_load_asks_the_device_for_nothing(case: Case, monkeypatch) -> None:
    """What a method remembers has come from the host."""
    torch.manual_seed(1)
    model = Light().bfloat16()
    trained = case.cls(model, 1e-3, placement="shadow", **case.settings)
    for _ in range(2):
        trained.step(lambda: model(torch.zeros(2, 5, dtype=torch.int64)).float().square().mean())
    model, opt = on_device(case, "shadow", monkeypatch)
    opt.load_state_dict(trained.state_dict())
    with Transfers() as transfers:
        for _ in range(2):
            opt.step(lambda: loss_of(model))
    assert opt.counters["steps"] == 4
    assert set(transfers.seen) == {("cpu", "meta")}
    assert transfers.waited == []


@PLACEMENTS
@pytest.mark.parametrize("case", METHODS.values(), ids=list(METHODS))
def test_a_captured_step_moves_nothing_between_host_and_device(case: Case, placement: str, monkeypatch) -> None:
    model, opt = on_device(case, placement, monkeypatch)
    for _ in range(10 if case.remembers else 0):  # a run that is old enough to look back as far as it ever will
        opt.step(lambda: loss_of(model))
    live = DeviceNumbers(opt.seed, 1, len(opt.schedule(0)), DEVICE)

    def step() -> None:
        live.begin()
        opt.step_with(live, lambda: loss_of(model))

    step()
    step()  # as GraphedStep's warm-up: what is kept on the device is there now
    with Transfers() as transfers:
        step()
    assert transfers.seen == []


def captured(opt: ZerothOrderOptimizer, closure: Callable[..., Any], many: int = 0, **how: Any) -> Transfers:
    """What a captured step moves. many: micro-batches, with weights."""
    live = DeviceNumbers(opt.seed, 1, len(opt.schedule(0)), DEVICE)
    batches = [torch.zeros(2, 5, dtype=torch.int64, device=DEVICE) for _ in range(many)] or None
    weights = torch.ones(many + 1, dtype=torch.float64, device=DEVICE) if many and "batched" not in how else None

    def step(*, ahead: bool = False) -> None:
        live.begin()
        opt.trust(ahead)
        opt.step_with(live, closure, batches, weights=weights, **how)
        live.count()

    for ahead in (False, opt.pipelined):
        step(ahead=ahead)
        step(ahead=ahead)
        with Transfers() as transfers:
            step(ahead=ahead)
        assert transfers.seen == []
    return transfers


EACH = ["mezo-adam", "helene", "gv"]
RANKS = pytest.mark.parametrize("parallel", [None, "directions"])


@RANKS
@pytest.mark.parametrize("placement", ["shadow", "stream"])
@pytest.mark.parametrize("name", EACH)
def test_a_captured_pipelined_step_moves_nothing(name: str, placement: str, parallel, monkeypatch) -> None:
    model, opt = on_device(METHODS[name], placement, monkeypatch, pipelined=True)
    if parallel is not None:
        of_ranks(opt, parallel, monkeypatch)
    captured(opt, lambda: loss_of(model))
    assert opt.copies_ahead


@RANKS
@pytest.mark.parametrize("name", EACH)
def test_captured_micro_batches_move_nothing(name: str, parallel, monkeypatch) -> None:
    """With weights from the device where no other rank has to be told of them."""
    model, opt = on_device(METHODS[name], "inplace", monkeypatch)
    if parallel is not None:
        of_ranks(opt, parallel, monkeypatch)
    how = {} if parallel is None else {"batched": False}
    captured(opt, lambda tokens: model(tokens).float().sum(), many=2, **how)


def learn(sharing: Sharing, probes: list[Any], kind: Any, alone: list[Tensor], rewind: Any) -> str:
    """The test whether rows mix, which reads losses and is made while a step is tried, without the comparisons."""
    single, rows = Rows(1), Rows(len(probes))
    sharing._together([next(filter(None, probes))], single)
    rows.alone = single.alone
    sharing._together(probes, rows)
    kind.kinds.update(rows.kinds)
    return ""


@RANKS
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["mezo-adam", "fzoo", "gv"])
def test_a_captured_step_inside_the_forward_moves_nothing(name: str, batched: bool, parallel, monkeypatch) -> None:
    model, opt = on_device(METHODS[name], "forward", monkeypatch, Net, distribution=zokern.LowRank(1))
    if parallel is not None:
        of_ranks(opt, parallel, monkeypatch)
    monkeypatch.setattr(factors, "_fill", lambda *_: None)  # a launch, as those of passes
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    if batched:
        monkeypatch.setattr(Sharing, "_test", learn)
        captured(opt, lambda tokens: model(tokens).float().square().mean(dim=1), many=1, batched=True)
        known = opt._batched.known.values()
        assert known or (parallel is not None and name != "fzoo")  # each rank has one probe
        assert [kind.why_not for kind in known if kind.why_not] == []
    else:
        captured(opt, lambda: loss_of(model))


class Ones(Late):
    """What a journal gets of a device without values: that steps were done."""

    def __init__(self, there: Tensor) -> None:
        super().__init__(there)
        self.values = torch.ones(there.shape)


@pytest.fixture
def journalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What writes a journal of a model without values."""
    monkeypatch.setattr(behind, "Arriving", Ones)
    monkeypatch.setattr(Ones, "polls", 2)
    for module in (run, recording):  # which read the weights, at the beginning and at the end
        monkeypatch.setattr(module, "hash_of", lambda pairs: "0" * 32)
    monkeypatch.setattr(Directions, "name", lambda self, seed, step: (0, 0))  # a device chooses some; ones are no seeds
    return functools.partial(journal.write, path=tmp_path / "run.zkj")


@pytest.mark.parametrize("case", METHODS.values(), ids=list(METHODS))
def test_a_journalled_step_asks_the_device_for_nothing(case: Case, journalled, tmp_path, monkeypatch) -> None:
    model, opt = on_device(case, "shadow", monkeypatch)
    with journalled(opt, lag=4):
        with Transfers() as transfers:
            for _ in range(6):
                opt.step(lambda: loss_of(model))
        assert set(transfers.seen) == {("cpu", "meta")}
        assert transfers.waited == []
        assert journal.progress(opt) == journal.Progress(behind=2, waits=0)
    assert sum(1 for _ in journal.Reader(tmp_path / "run.zkj").steps()) == 6


@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")  # of losses that do not depend on the weights
def test_many_journalled_steps_wait_for_nothing(journalled, tmp_path, monkeypatch) -> None:
    """Three times as many as the file may be behind, by default."""
    model, opt = on_device(METHODS["mezo"], "inplace", monkeypatch)
    loss, steps = loss_of(model), 3 * behind.LAG
    with journalled(opt):
        for _ in range(steps):
            opt.step(lambda: loss)
        assert journal.progress(opt).waits == 0
        assert 0 < journal.progress(opt).behind <= behind.LAG
    assert sum(1 for _ in journal.Reader(tmp_path / "run.zkj").steps()) == steps


@pytest.mark.parametrize("name", ["mezo", "hizoo-3", "helene", "gv-curved", "fzoo"])
def test_blocks_filled_ahead_ask_the_device_for_nothing(name: str, monkeypatch) -> None:
    """Neither in eager steps nor in captured ones: the side stream reads what the step has sent."""
    model, opt = on_device(METHODS[name], "stream", monkeypatch, prefetch=True)
    lanes = side_streams.use(monkeypatch, side_streams.Recording)
    with Transfers() as transfers:
        for _ in range(3):
            opt.step(lambda: loss_of(model))
    assert set(transfers.seen) == {("cpu", "meta")}
    assert transfers.waited == []
    captured_moves_nothing(model, opt)
    assert lanes[0].events
    assert not lanes[0].unordered


@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "hizoo", "gv-kept"])
def test_gates_of_blocks_stay_on_the_device(name: str, monkeypatch) -> None:
    """A captured step that leaves out blocks; and what a pass writes to its tables before it."""
    case, built = METHODS[name], []
    model, opt = on_device(replace(case, options={**case.options, "layers": RandomBlocks(2)}), "inplace", monkeypatch)
    live = DeviceNumbers(opt.seed, 1, len(opt.schedule(0)), DEVICE, 4)

    def tables(self: Operands) -> list[table.Table]:
        nothing = [0] * len(self.src)
        built.append(table.build(self.src, self.src, nothing, nothing, nothing, blocks=self.blocks))
        built[-1].open(self.gates)
        return []

    def step() -> None:
        live.begin()
        opt.step_with(live, lambda: loss_of(model))

    for _ in range(2):
        step()
    with monkeypatch.context() as patch:
        patch.setattr(Operands, "tables", tables)
        opt.active.sweep.forget()
        step()
    assert built
    with Transfers() as transfers:
        step()
        for one in built:
            one.open(live.gates)
    assert transfers.seen == []
    with Transfers() as transfers:
        live.leave_out({1, 2})
    assert transfers.seen == [("cpu", "meta")]
    assert transfers.waited == []


class Nowhere(Exchange):
    """Gathers on the device, and sends nothing."""

    def gather(self, own: Tensor, seconds: float, what: str) -> Tensor:
        assert own.device == DEVICE
        return torch.empty((self.places.size, *own.shape), dtype=own.dtype, device=DEVICE)


def of_ranks(opt: ZerothOrderOptimizer, parallel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it one of three ranks, which have compared their weights."""
    monkeypatch.setattr(Agreement, "look", lambda self: None)  # what the others say comes by a CUDA event too
    monkeypatch.setattr(agreement, "Arriving", lambda there: None)
    one, each = (0, 0, 0), (0, 1, 2)
    data, share = (each, one) if parallel == "data" else (one, each)
    opt._ranks, opt._decided = Ranks(Places(each, 1, data, share, (True,) * 3, "a test")), True
    opt._ranks.exchange, opt._ranks.compared = Nowhere(opt._ranks.places), True
    opt._ranks.most = opt._ranks.needed(opt)


@pytest.mark.parametrize("parallel", ["data", "directions"])
@pytest.mark.parametrize(
    "name", ["mezo-adam", "hizoo-3", "helene", "gv", "gv-kept", "greedy-curved", "fzoo", "es-ranked"]
)
def test_a_step_of_several_ranks_asks_the_device_for_nothing(name: str, parallel: str, monkeypatch) -> None:
    case = METHODS[name]
    model, opt = on_device(case, "shadow", monkeypatch)
    of_ranks(opt, parallel, monkeypatch)
    with Transfers() as transfers:
        for _ in range(3):
            opt.step(lambda: loss_of(model))
    assert opt.counters["steps"] == 3
    assert set(transfers.seen) == {("cpu", "meta")}
    assert transfers.waited == []
    captured_moves_nothing(model, opt)


READS = {
    "float": float,
    "bool": bool,
    "item": Tensor.item,
    "tolist": Tensor.tolist,
    "cpu": Tensor.cpu,
    "if": lambda x: 1.0 if x > 0 else 2.0,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": torch.nonzero,
    "a mask": lambda x: x[x > 0],
}


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_a_step_that_reads_a_value_is_noticed(read, monkeypatch) -> None:
    model, opt = on_device(METHODS["mezo"], "shadow", monkeypatch)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        opt.step(lambda: (read(loss_of(model)), loss_of(model))[1])


SENDS = {
    "to": lambda x: x * torch.ones(2).to(DEVICE)[0],
    "to another dtype": lambda x: x * torch.ones(2).to(DEVICE, torch.float64)[0],
    "copy_": lambda x: x.clone().copy_(torch.ones(())),
    "tensor": lambda x: x * torch.tensor(2.0, device=DEVICE),
    "as_tensor": lambda x: x * torch.as_tensor([2.0], device=DEVICE)[0],
    "new_tensor": lambda x: x * x.new_tensor(2.0),
    "index": lambda x: x[None][torch.tensor([0])].sum(),
    "where": lambda x: torch.where(x > 0, torch.tensor(2.0), x),
}


@pytest.mark.parametrize("send", SENDS.values(), ids=list(SENDS))
def test_a_copy_that_the_host_waits_for_is_noticed(send, monkeypatch) -> None:
    """The same steps pass with copies that it does not wait for, and with numbers that are filled in."""
    for made, waits in ((send, True), (lambda x: x * 2.0 + torch.ones(2).to(DEVICE, non_blocking=True)[0], False)):
        model, opt = on_device(METHODS["mezo"], "shadow", monkeypatch)
        with Transfers() as transfers:
            opt.step(lambda model=model, made=made: made(loss_of(model)))
        assert bool(transfers.waited) == waits


class FromTheDevice(TorchDispatchMode):
    """Makes copies from "meta" to the host zeros, and notes whether the host waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_host = kwargs.get("device") == torch.device("cpu")
        if func.name().split(".")[0] == "aten::_to_copy" and args[0].device == DEVICE and to_host:
            self.waited.append(not kwargs.get("non_blocking", False))
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


def test_the_host_waits_for_what_it_reads_itself() -> None:
    """A learning rate on the device, weights and losses on the host: the host's pass must not run before it has come."""
    model = Net()
    opt = zokern.MeZO(model, torch.tensor(1e-3, device=DEVICE), placement="inplace")
    with FromTheDevice() as copies:
        opt.step(lambda: model(torch.zeros(2, 5, dtype=torch.int64)).square().mean())
    assert copies.waited
    assert all(copies.waited)

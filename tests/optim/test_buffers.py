"""A step leaves the buffers that forwards change as they were, whoever changes them and however."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import zokern
from zokern.optim import buffers


class Average(nn.Module):
    """A moving average, a queue and counts of what passes, written in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inner = way, nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("queue", torch.zeros(4, 8))
        self.register_buffer("counts", torch.zeros(5, dtype=torch.long))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        now = x.detach().mean(0).to(self.mean.dtype)
        match self.way:
            case "in place":
                self.mean.mul_(0.9).add_(now, alpha=0.1)
            case "another tensor":
                self.mean = 0.9 * self.mean + 0.1 * now
            case "past autograd":
                self.mean.data.mul_(0.9).add_(now, alpha=0.1)
            case "other data":
                self.mean.data = 0.9 * self.mean + 0.1 * now
            case "a queue":
                self.queue[int(self.counts.sum()) % 4] = now
                self.counts[0] += 1
            case "counts":
                self.counts[int(self.counts.sum()) % 5] += 1
                self.seen[int(self.counts.sum()) % 4] = True
            case "batch_norm":
                return nn.functional.batch_norm(x, self.mean, self.scale, training=True)
        return x + 0.1 * self.mean.to(x.dtype)


WAYS = ("in place", "another tensor", "past autograd", "other data", "a queue", "counts", "batch_norm")
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
    "BatchNorm1d, cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "BatchNorm1d without weights": lambda: nn.BatchNorm1d(8, affine=False),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(16, track_running_stats=True),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral_norm of old": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    **{way: lambda way=way: Average(way) for way in WAYS},
}


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), block()) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x).float().square().mean()


def made(block: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[Model, Tensor]:
    """In training mode, after a forward."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model, x = Model(block).to(dtype).train(), torch.randn(16, 8).to(dtype)
        model(x)
    return model, x


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
def test_they_are_as_they_were(name, dtype, placement):
    model, x = made(BLOCKS[name], dtype)
    before = copies(model)
    opt = zokern.MeZO(model, 1e-2, placement=placement, num_samples=2)
    for _ in range(3):
        opt.step(lambda: model(x))
        after = dict(model.named_buffers())
        assert before.keys() == after.keys()
        assert [n for n, b in before.items() if not torch.equal(b, after[n])] == []
    assert float(opt.metrics["projected_gradient"]) != 0.0
    with torch.no_grad():
        model(x)  # they follow between steps
    assert (name != "weight_norm") == any(not torch.equal(b, dict(model.named_buffers())[n]) for n, b in before.items())


def test_all_probes_see_the_same_ones():
    """The second probe's forward starts from what the first one's did."""
    model, x = made(lambda: Average("batch_norm"), torch.float32)
    starts: list[Tensor] = []

    def closure() -> Tensor:
        starts.append(model.layers[0][1].mean.clone())
        return model(x)

    opt = zokern.MeZO(model, 1e-2)
    for _ in range(2):
        opt.step(closure)
    assert all(torch.equal(s, starts[0]) for s in starts)


def test_a_script_s_are_too():
    plain = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    model, x = torch.jit.script(copy.deepcopy(plain)), torch.randn(16, 8)
    model(x)
    before = copies(model)
    opt, other = zokern.MeZO(model, 1e-2, placement="inplace"), zokern.MeZO(plain, 1e-2, placement="inplace")
    for _ in range(3):
        opt.step(lambda: model(x).square().mean())
        other.step(lambda: plain(x).square().mean())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    with pytest.raises(TypeError, match="give the module that it was made of"):
        zokern.check(model, lambda: model(x).square().mean())
    assert zokern.check(plain, lambda: plain(x).square().mean()).ok


def test_large_tables_of_whole_numbers_are_weights():
    model = nn.Linear(2, 2)
    model.register_buffer("packed", torch.zeros(buffers.SMALL + 1, dtype=torch.uint8))
    model.register_buffer("points", torch.zeros(buffers.SMALL, dtype=torch.uint8))
    assert [name for _, name in buffers.candidates(model)] == ["points"]


def test_only_what_changes_is_kept():
    model, x = made(lambda: Average("past autograd"), torch.float32)
    opt = zokern.MeZO(model, 1e-2)
    opt.step(lambda: model(x))
    assert [t.numel() for t in opt._guards.memory()] == [8, 8]


class Keeper(nn.Module):
    """Gives its buffer other memory, or another shape, in the forward."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inner = way, nn.Linear(8, 8)
        self.register_buffer("last", torch.zeros(0) if way == "grown from nothing" else torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "the user's batch":
                self.last.data = x
            case "another shape":
                self.last.data = x[:1]
            case "a part of itself":
                self.last.data = self.last.data[:2]
            case "grown" | "grown from nothing":  # grown in place
                self.last.resize_(9, 8).fill_(2.0)
            case "set":
                self.last.set_(x)
            case "another type":
                self.last.data = x.double()
        return self.inner(x)


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
@pytest.mark.parametrize(
    "way",
    ["the user's batch", "another shape", "a part of itself", "grown", "grown from nothing", "set", "another type"],
)
def test_a_buffer_gets_its_own_memory_back(way: str, placement: str) -> None:
    module, x = Keeper(way), torch.ones(4, 8)
    last, before = module.last, module.last.clone()
    opt = zokern.MeZO(module, 1e-3, placement=placement)
    for _ in range(3):
        opt.step(lambda: module(x).square().mean())
        assert module.last is last
        assert last.dtype == before.dtype
        assert torch.equal(last, before)
        assert torch.equal(x, torch.ones(4, 8))  # what it had in between is the user's


def test_a_shape_that_the_user_changes_between_steps_stays() -> None:
    module, x = Average("past autograd"), torch.randn(4, 8)
    opt = zokern.MeZO(module, 1e-3)
    opt.step(lambda: module(x).square().mean())
    module.mean.data = torch.full((1, 8), 3.0)
    for _ in range(2):
        opt.step(lambda: module(x).square().mean())
        assert torch.equal(module.mean, torch.full((1, 8), 3.0))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    "dtype",
    sorted(
        {d for d in vars(torch).values() if isinstance(d, torch.dtype) and not str(d).startswith("torch.q")}, key=str
    ),
    ids=str,
)
def test_a_buffer_of_any_type_lets_a_step_be_done(dtype: torch.dtype) -> None:
    module = Keeper("none")
    module.register_buffer("packed", torch.empty(4, dtype=dtype))
    opt = zokern.MeZO(module, 1e-3)
    opt.step(lambda: module(torch.ones(4, 8)).square().mean())
    assert opt.counters["steps"] == 1

"""placement="stream": what cannot be served is refused by name, and a block's weights are nobody's outside it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import HUGGING_FACE, WIDTH, Block, Toy, seeded, toy
from tests.placement.streaming import State, assert_same_as_shadow, sequential
from zokern.placement.outside import OutsideItsBlock


class AcrossBlocks(Toy):
    """A block reads the weight of another."""

    def run(self, x: Tensor) -> Tensor:
        self.layers[2].__dict__["other"] = self.layers[1]
        self.layers[2].register_forward_hook(lambda m, a, out: out @ m.other.inner.weight)
        return super().run(x)


class Outside(Toy):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x) + self.layers[1].gain


class CastOutside(Toy):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x) + self.layers[1].gain.type(torch.float64)


class PartOfABlock(Toy):
    def run(self, x: Tensor) -> Tensor:
        return super().run(self.layers[1].inner(x))


class ForwardCalled(Toy):
    """Past the hooks."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return x


class Nested(Toy):
    """A block calls another that is not its child."""

    def run(self, x: Tensor) -> Tensor:
        self.layers[1].register_forward_pre_hook(lambda m, a: (self.layers[2](a[0]),))
        return super().run(x)


class EarlyExit(Toy):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


class ReturnsItsWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), self.inner.weight[0]


class Returned(Toy):
    """A view of a block's weight is used after the next block ran in the same memory."""

    def __init__(self) -> None:
        super().__init__(ReturnsItsWeight)

    def run(self, x: Tensor) -> Tensor:
        views = []
        for layer in self.layers:
            x, view = layer(x)
            views.append(view)
        return x + sum(views)


class Replaced(Toy):
    def run(self, x: Tensor) -> Tensor:
        self.layers[1].gain = nn.Parameter(torch.zeros(WIDTH))
        return super().run(x)


class Functional(Toy):
    def run(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.layers[1], {"gain": torch.zeros(WIDTH)}, (x,))


class Penalty(Toy):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x) + sum(p.square().sum() for p in self.parameters())


class Graph(Toy):
    """Autograd would read the weights of a block after it ran."""

    def run(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return super().run(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "across blocks": (AcrossBlocks, r"layers\.1\.inner\.weight was used outside"),
    "from outside": (Outside, r"layers\.1\.gain was used outside"),
    "cast outside": (CastOutside, r"layers\.1\.gain was used outside"),
    "a part of a block called": (PartOfABlock, r"layers\.1\.inner\.weight was used outside"),
    "forward() called": (ForwardCalled, r"layers\.0\.\S+ was used outside"),
    "a block in another": (Nested, r"layers\.2 was called while layers\.1 runs"),
    "early exit": (EarlyExit, r"did not call layers\.3"),
    "a view returned": (Returned, r"view of the perturbed weights of layers\.0"),
    "replaced": (Replaced, r"layers\.1\.gain was replaced"),
    "functional_call": (Functional, r"layers\.1\.gain was replaced"),
    "penalty on all weights": (Penalty, r"was used outside"),
    "gradients": (Graph, r"view of the perturbed weights of layers\.0"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refused_by_name_and_clean_after(build, message, dtype):
    model = seeded(build, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    objects = [p for n, p in model.named_parameters()]
    opt = zokern.MeZO(model, 1e-2, placement="stream")
    with pytest.raises(RuntimeError, match=message + r"[\s\S]*placement='shadow'"):
        opt.step(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert opt.counters["steps"] == 0


def test_a_block_that_calls_another_block_as_its_child_is_handled():
    """Its weights then count as shared, outside the blocks."""

    class Chain(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.layers[2].helper = self.layers[0]
            self.layers[2].register_forward_hook(_use_helper)

    assert_same_as_shadow(Chain)


def _use_helper(module: nn.Module, _: Any, out: Tensor) -> Tensor:
    return out + module.helper(out)


VALUES: dict[str, Callable[[nn.Parameter], Any]] = {
    "+": lambda p: p + 1,
    "in a list": lambda p: torch.cat([p, p]),
    "foreach": lambda p: torch._foreach_mul([p], 2.0),
    "operator": lambda p: torch.ops.aten.add.Tensor(p, p),
    "type": lambda p: p.type(torch.float64),
    "numpy": lambda p: p.detach().numpy(),
    "tolist": lambda p: p.tolist(),
    "item": lambda p: p[0].item(),
    "data": lambda p: p.data,
    "data =": lambda p: setattr(p, "data", torch.zeros(WIDTH)),
    "data_ptr": lambda p: p.data_ptr(),
    "storage": lambda p: p.untyped_storage().data_ptr(),
    "dlpack": torch.from_dlpack,
    "in place": lambda p: p.zero_(),
    "copied from": lambda p: torch.zeros(WIDTH).copy_(p),
    "copied to": lambda p: p.copy_(torch.zeros(WIDTH)),
    "equal": lambda p: torch.equal(p, torch.zeros(WIDTH)),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda p: torch.save(p, io.BytesIO()),
    "subclass": lambda p: p.as_subclass(torch.Tensor),
    "without torch functions": lambda p: _raw_add(p),
    "autograd.Function": lambda p: _Identity.apply(p),
}


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return p * 1.0


def _raw_add(p: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return p + 1


@pytest.mark.parametrize("read", VALUES.values(), ids=VALUES)
def test_values_of_a_block_cannot_be_read_outside_it(read):
    model = toy()
    state = State(model)
    reached = []

    def closure() -> Tensor:
        p = model.layers[1].gain
        assert isinstance(p, OutsideItsBlock)
        reached.append(read(p))
        return model()

    with pytest.raises((RuntimeError, TypeError)):
        zokern.MeZO(model, 1e-2, placement="stream").step(closure)
    assert not reached
    state.clean()


def test_what_may_be_asked_of_a_parameter_outside_its_block():
    model = toy(torch.bfloat16)
    for p in model.parameters():
        p.of_a_library = "kept"
    clean = dict(model.named_parameters())

    def closure() -> Tensor:
        inside = dict(model.named_parameters())
        assert list(inside) == list(clean)
        for name, p in inside.items():
            own_p = clean[name]
            assert p is not own_p
            assert isinstance(p, nn.Parameter)
            for ask in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "nbytes", "layout", "is_cuda"):
                assert getattr(p, ask) == getattr(own_p, ask), ask
            for ask in ("size", "stride", "numel", "nelement", "element_size", "dim", "is_contiguous", "type"):
                assert getattr(p, ask)() == getattr(own_p, ask)(), ask
            assert len(p) == len(own_p)
            assert p.is_floating_point()
            assert p.grad is None
            assert p.of_a_library == "kept"
        assert "layers.1.gain" in repr(model.layers[1].gain)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in clean.values())
        model.zero_grad()
        model.train()
        model.eval()
        return model()

    zokern.MeZO(model, 1e-2, placement="stream").step(closure)


def test_a_tied_parameter_in_a_block_is_one_parameter_inside_the_closure():
    def tied() -> nn.Module:
        block = Block()
        block.again = nn.Linear(WIDTH, WIDTH)
        block.again.weight = block.inner.weight
        return block

    model = seeded(lambda: Toy(tied))
    names = [n for n, _ in model.named_parameters()]
    opt = zokern.MeZO(model, 0.0, placement="stream")
    opt.step(lambda: [n for n, _ in model.named_parameters()] == names and model())


def test_properties_of_hugging_face_models_inside_the_closure():
    model = seeded(HUGGING_FACE["OPT"], torch.bfloat16)
    size, memory = model.model.num_parameters(only_trainable=True), model.model.get_memory_footprint()

    def closure() -> Tensor:
        assert model.model.dtype == torch.bfloat16
        assert model.model.device == torch.device("cpu")
        assert model.model.num_parameters(only_trainable=True) == size
        assert model.model.get_memory_footprint() == memory
        return model()

    zokern.MeZO(model, 1e-2, placement="stream").step(closure)


def test_stream_needs_a_module_with_blocks():
    with pytest.raises(ValueError, match=r"placement='stream'.*pass the nn\.Module"):
        zokern.MeZO(toy().parameters(), 1e-3, placement="stream")
    with pytest.raises(ValueError, match=r"Sequential has no nn\.ModuleList of equal blocks; use placement='shadow'"):
        zokern.MeZO(sequential(), 1e-3, placement="stream")
    with pytest.raises(ValueError, match=r"DataParallel; use placement='inplace'"):
        zokern.MeZO(nn.DataParallel(toy()), 1e-3, placement="stream")
    traced = toy()
    traced.norm = torch.jit.trace(traced.norm, torch.ones(2, WIDTH))
    with pytest.raises(ValueError, match=r"norm, a \w+; use placement='inplace'"):
        zokern.MeZO(traced, 1e-3, placement="stream")

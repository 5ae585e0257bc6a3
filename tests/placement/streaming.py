"""What the tests of placement="stream" share: a module's state, runs beside those in copies, what a perturbed model is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zokern
from tests import methods
from tests.methods import METHODS
from tests.models import WIDTH, Block, Toy, seeded
from zokern.placement.stream import Stream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHOWN = ["mezo", "hizoo", "helene", "gv-curved", "fzoo"]


class State:
    """A module's parameters (objects, storages, bits) and all of its hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entries = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
        self.values = [p.detach().clone() for _, _, p in self.entries]
        self.addresses = [p.data_ptr() for _, _, p in self.entries]
        self.hooks = self.counted()

    def counted(self) -> list[tuple[str, int]]:
        return [
            (key, len(value))
            for m in self.model.modules()
            for key, value in vars(m).items()
            if "hooks" in key and isinstance(value, dict)
        ]

    def in_place(self) -> None:
        for (module, name, p), address in zip(self.entries, self.addresses, strict=True):
            assert module._parameters[name] is p, f"{name} is not the module's own parameter any more"
            assert p.data_ptr() == address
            if isinstance(module, nn.LSTM):
                assert any(w is p for w in module._flat_weights)
        assert self.counted() == self.hooks

    def clean(self) -> None:
        self.in_place()
        for (_, name, p), value in zip(self.entries, self.values, strict=True):
            view = torch.int32 if p.element_size() == 4 else torch.int16
            assert torch.equal(p.detach().view(view), value.view(view)), f"{name} is dirty"


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def run(
    build: Callable[[], nn.Module],
    name: str,
    dtype: torch.dtype | None = None,
    method: str = "mezo",
    steps: int = 3,
    loss: Callable[[nn.Module], Tensor] = lambda m: m(),
    **options: Any,
) -> tuple[nn.Module, list[Tensor], Any]:
    model = seeded(build, dtype)
    state, seen = State(model), []

    def closure() -> Tensor:
        seen.append(loss(model))
        return seen[-1]

    opt = methods.build(METHODS[method], model, placement=name, seed=7, eps=1e-2, weight_decay=0.1, **options)
    for _ in range(steps):
        opt.step(closure)
    state.in_place()
    assert opt.skipped_steps == 0
    return model, seen, opt


def assert_same_as_shadow(build: Callable[[], nn.Module], *args: Any, **options: Any) -> Any:
    one, seen, a = run(build, "shadow", *args, **options)
    two, seen2, b = run(build, "stream", *args, **options)
    assert isinstance(b._placement, Stream)
    assert len({float(x) for x in seen}) > 1
    assert all(torch.equal(x, y) for x, y in zip(seen, seen2, strict=True))
    assert same(one, two)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        assert all(torch.equal(a.state[p][k], b.state[q][k]) for k in a.state[p])
    return b


def perturbed(model: nn.Module, active: set[str], seed: int, eps: float) -> nn.Module:
    """An independent copy at round(theta + eps z)."""
    other = copy.deepcopy(model)
    named = [(i, p) for i, (n, p) in enumerate(other.named_parameters()) if n in active]
    with torch.no_grad():
        zokern.add_noise_([p for _, p in named], tensor_ids=[i for i, _ in named], seeds=[seed], coefs=[eps])
    return other


class SharedModules(Toy):
    """One module in two blocks, and a block's module called from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3].inner = self.layers[0].inner
        self.also = self.layers[1].norm

    def run(self, x: Tensor) -> Tensor:
        return super().run(self.also(x)) @ self.also.weight.diag()


class Recurrent(nn.Module):
    """nn.LSTM keeps a list of its weights beside."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lstm(x)[0]


class TwoStacks(Toy):
    """With more weights in one block than in the others, and mixed dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].inner = nn.Sequential(nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)).bfloat16()
        self.layers[2].norm.bfloat16()
        self.after = nn.ModuleList(Block() for _ in range(2))

    def run(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, *self.after]:
            dtype = layer.norm.weight.dtype  # may be asked for outside
            x = layer(x.to(dtype)).to(x.dtype)
        return x


def compiled_whole(model: Toy) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_inside(model: Toy) -> nn.Module:
    model.layers[2].inner.compile(backend="eager")
    return model


def sequential(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(dtype)

"""placement="forward": products with a stand-in are those with the perturbed weight, by whatever module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zokern
from tests.models import seeded
from zokern.contract import reference
from zokern.directions import LowRank
from zokern.placement import Forward
from zokern.sweep import Member, Passes, Sweep

EPS = 0.03
TERMS = {11: 1.0}
THREE = {11: 1.0, 12: -0.5, 13: 0.25}


class Conv1D(nn.Module):
    """GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 20) * 0.3), nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 20)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(30, 12, padding_idx=2), nn.Linear(12, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids)))


class ReadElsewhere(nn.Module):
    """A weight that is used without its module, before and behind its module's own call."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], before: bool) -> None:
        super().__init__()
        self.inner, self.use, self.before = nn.Linear(12, 12), use, before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = self.use(x, self.inner.weight)
            return self.inner(x)
        return self.use(self.inner(x), self.inner.weight)


class Renormed(nn.Module):
    """Writes to its weight in its forward, as the old spectral norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.inner.weight.div_(self.inner.weight.norm())
        return self.inner(x)


class Routed(nn.Module):
    """Experts in a list, of which a batch calls some."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x) + self.experts[2](x[:0]).sum()


class Fused(nn.Module):
    """Experts in one tensor, [E, out, in] or with the sides turned; rows are sorted by expert."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.weight = way, nn.Parameter(0.3 * torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
        of = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3, 3])
        if self.way == "one":
            parts = [functional.linear(x[of == e], self.weight[e]) for e in (torch.tensor(0), 2, 3)]
            return torch.cat(parts)
        if self.way == "gathered":
            return torch.bmm(self.weight[of], x.unsqueeze(-1)).squeeze(-1)
        if self.way == "gathered, turned":
            return torch.bmm(x.unsqueeze(1), self.weight[of]).squeeze(1)
        if x.dtype == torch.float64:  # grouped_mm has no float64
            w = self.weight.mT if self.way == "turned" else self.weight
            return torch.bmm(x.unsqueeze(1), w[of]).squeeze(1)
        if self.way == "turned":
            return functional.grouped_mm(x, self.weight.transpose(-2, -1), offs=ends)
        return functional.grouped_mm(x, self.weight, offs=ends)


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def words(*shape: int) -> Tensor:
    return torch.randint(30, shape, generator=torch.Generator().manual_seed(1))


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# Each with its input, and how many matrices of it become copies.
MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: nn.Linear(12, 20), rows(7, 12), 0),
    "linear, one row": (lambda: nn.Linear(12, 20), rows(12), 0),
    "linear, no row": (lambda: nn.Linear(12, 20), rows(0, 12), 0),
    "linear without bias, strided input": (lambda: nn.Linear(12, 20, bias=False), rows(4, 12, 3).transpose(1, 2), 0),
    "Conv1D": (Conv1D, rows(2, 3, 12), 0),
    "embedding": (lambda: nn.Embedding(30, 12, padding_idx=2), words(2, 5), 0),
    "scaled embedding": (lambda: ScaledEmbedding(30, 12), words(2, 5), 0),
    "tied": (Tied, words(2, 5), 0),
    "other product": (lambda: ReadElsewhere(lambda x, w: x @ w.T, True), rows(7, 12), 0),
    "transposes": (lambda: ReadElsewhere(lambda x, w: torch.matmul(x, w.transpose(-1, 0).mT), False), rows(2, 7, 12), 0),
    "slices": (lambda: ReadElsewhere(lambda x, w: functional.linear(x, w[2:9]) @ w[:7], True), rows(7, 12), 0),
    "read before": (lambda: ReadElsewhere(lambda x, w: x * w.mean(dim=1), True), rows(7, 12), 1),
    "read behind": (lambda: ReadElsewhere(lambda x, w: x + w.square().sum(), False), rows(7, 12), 1),
    "a row": (lambda: ReadElsewhere(lambda x, w: x + w[3], False), rows(7, 12), 1),
    "part read": (lambda: ReadElsewhere(lambda x, w: x + w[3:5].sum() + w.mT.std(), False), rows(7, 12), 1),
    "as a matrix": (lambda: ReadElsewhere(lambda x, w: (w @ x.T).T, False), rows(7, 12), 1),
    "written to": (Renormed, rows(7, 12), 1),
    "max_norm": (lambda: nn.Embedding(30, 12, max_norm=0.5), words(2, 5), 1),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 20)), rows(7, 12), 1),
    "attention": (lambda: Attention(12, 2), rows(4, 2, 12), 2),
    "encoder": (lambda: nn.TransformerEncoderLayer(12, 2, 24), rows(4, 2, 12), 2),
    "LSTM": (lambda: Recurrent(12, 7), rows(4, 2, 12), 0),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(6, 5, 5), nn.Flatten(), nn.Linear(40, 4)), rows(2, 6, 12), 1),
    "routed": (Routed, rows(5, 12), 0),
    **{f"fused, {way}": (lambda way=way: Fused(way), rows(10, 16), 0) for way in ("one", "gathered", "gathered, turned")},
    **{f"fused, grouped {way}": (lambda way=way: Fused(way), rows(10, 16), 0) for way in ("turned", "as it is")},
}  # fmt: skip


@contextlib.contextmanager
def presented(
    module: nn.Module, rank: int = 1, terms: Mapping[Any, float] = TERMS, **options: Any
) -> Iterator[Forward]:
    placement = Forward(**options)
    placement.bind(module, Passes(LowRank(rank), "auto"))
    sweep = Sweep([Member(p, i, 0, name) for i, (name, p) in enumerate(module.named_parameters())])
    placement.begin(sweep, torch.tensor([EPS], dtype=torch.float64), scaled=False)
    try:
        with torch.no_grad(), placement.present(terms):
            yield placement
    finally:
        placement.end()


def noisy(module: nn.Module, rank: int, terms: Mapping[int, float], dtype: torch.dtype | None = None) -> nn.Module:
    """With the perturbed weights written out: by the contract, rounded once to `dtype`, or to that of each weight."""
    made = copy.deepcopy(module)
    for i, p in enumerate(made.parameters()):
        total = p.double()
        for seed, a in terms.items():
            z = reference.noise(p.numel(), seed, i, 0, f"lowrank:{rank}", tuple(p.shape))
            total = total + EPS * a * torch.from_numpy(z.copy()).view(p.shape)
        p.data = total.to(p.dtype if dtype is None else dtype)
    return made


def outputs(
    module: nn.Module, x: Tensor, rank: int, terms: Mapping[int, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Forward]:
    """Under forward, with weights written out, in float64, and without noise."""
    dtype = next(module.parameters()).dtype
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        clean = copy.deepcopy(module)(x)
        exact = noisy(module, rank, terms, torch.float64)(x.double() if x.is_floating_point() else x)
        rounded = noisy(module, rank, terms)(x)
    with presented(module, rank, terms) as placement:
        seen = module(x)
    return seen, rounded, exact, clean, placement


def error(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact.double()).square().sum().sqrt())


@pytest.mark.parametrize(
    ("rank", "terms"), [(1, TERMS), (3, TERMS), (1, THREE), (2, THREE)], ids=["1", "3", "1x3", "2x3"]
)
@pytest.mark.parametrize("name", MODULES)
def test_outputs_are_those_of_perturbed_weights(name, rank, terms, capfd):
    make, x, copied = MODULES[name]
    module = seeded(make)
    before = [p.detach().clone() for p in module.parameters()]
    seen, rounded, exact, clean, placement = outputs(module, x, rank, terms)
    assert seen.dtype == rounded.dtype
    assert seen.shape == rounded.shape
    assert error(seen, exact) <= 3 * error(rounded, exact) + 1e-7 * float(exact.norm())
    assert seen.numel() == 0 or error(clean, exact) > 1e-3 * float(exact.norm())
    assert len(placement.copied) == copied
    assert ("perturbs a copy" in capfd.readouterr().err) == bool(copied)
    assert all(type(p) is nn.Parameter for p in module.parameters())
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))

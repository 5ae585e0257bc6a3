"""Healthy models are not accused: what has no effect is read, or nobody asked for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import models
from tests.checking.models import Norms, inputs
from tests.checking.models import engine as made
from tests.models import HUGGING_FACE, Experts, Mixed, Toy, seeded
from zokern.checking.result import NO_EFFECT, REACTS, Result, Row


def row(result: Result, name: str) -> Row:
    (found,) = [row for row in result.rows if name in row.names]
    return found


@pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [models.Block, Experts])
def test_toys(placement: str, dtype: torch.dtype, block: type[nn.Module]) -> None:
    model = seeded(lambda: Toy(block, depth=2), dtype)
    result = zokern.check(model, model, placement=placement)
    assert result.ok
    assert result.placement == placement
    assert {row.state for row in result.rows} == {REACTS}
    assert repr(result) == str(result)  # what a notebook shows
    assert result.looked_at == result.trainable == len(list(model.parameters()))
    assert result.same_twice
    assert result.noise == 0.0
    if dtype == torch.float32:  # one forward a tensor, and four that look at the closure itself
        assert result.forwards == result.trainable + 4


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name: str) -> None:
    model = seeded(HUGGING_FACE[name])
    result = zokern.check(model, model)
    assert result.ok, str(result)
    # 19 words and 2 sentences: what has no effect is read, and is no weight matrix.
    assert all("bias" in row.name or "relative" in row.name for row in result.without_effect), str(result)


@pytest.mark.parametrize("sixteen", [False, True])
def test_lstm_and_two_dtypes(sixteen: bool) -> None:
    model = seeded(lambda: Mixed(sixteen))
    result = zokern.check(model, model, placement="shadow")
    assert result.ok, str(result)
    assert {row.state for row in result.rows} == {REACTS}


def test_a_tied_weight_is_one_row() -> None:
    model = models.toy()
    assert row(zokern.check(model, model), "embedding.weight").names == ("embedding.weight", "head.weight")


class Attention(nn.Module):
    """One head; the mean of its outputs' squares."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

    def forward(self) -> Tensor:
        x = torch.linspace(-1, 1, 30, dtype=self.key.weight.dtype).reshape(5, 6).sin()
        scores = self.query(x) @ self.key(x).T / 6**0.5
        # Exact cancellation: what rounding leaves of a key bias would be a reaction, and rightly.
        scores = (scores.double() - self.query(x).double() @ self.key.bias.double()[:, None] / 6**0.5).float()
        return (torch.softmax(scores, -1) @ self.value(x).float()).square().mean()


def test_key_biases() -> None:
    """Softmax does not see what is added to a whole row."""
    model = seeded(Attention)
    exact = zokern.check(model, lambda: (model() * 2**10).round())  # without what rounding leaves
    assert row(exact, "key.bias").state == NO_EFFECT
    assert not row(exact, "key.bias").suspicious
    assert "key biases" in row(exact, "key.bias").why
    assert row(exact, "key.weight").state == REACTS
    assert exact.ok, str(exact)


class Routed(nn.Module):
    """Four experts, of which a batch reaches two; as modules, each called with its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor | None = None) -> Tensor:
        x = torch.linspace(-1, 1, 30).reshape(5, 6) if x is None else x
        out = torch.zeros_like(x)
        for i in (0, 2):
            out = out + self.gate(x)[:, i : i + 1].sigmoid() * self.experts[i](x)
        return out.square().mean()


def test_experts_that_were_not_routed_to() -> None:
    model = seeded(Routed)
    result = zokern.check(model, model)
    assert result.ok, str(result)
    assert [one.name for one in result.without_effect] == [
        f"experts.{i}.{name}" for i in (1, 3) for name in ("weight", "bias")
    ]
    assert "experts without tokens" in result.without_effect[0].why


class Encoder(nn.Module):
    """With what encoders have and a batch may not use."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(9, 6), nn.Embedding(2, 6)
        self.mask_token = nn.Parameter(torch.ones(6))
        self.layer = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.pooler, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, masked: bool = False) -> tuple[Tensor, Tensor]:
        x = self.words(torch.arange(4)) + self.types(torch.zeros(4, dtype=torch.long))
        x = self.layer(x + self.mask_token if masked else x)
        return x, self.pooler(x)


def test_poolers_token_types_mask_tokens_and_heads() -> None:
    model = seeded(Encoder)
    result = zokern.check(model, lambda: model()[0].square().mean())
    assert result.ok, str(result)
    assert {one.name for one in result.without_effect} == {
        "mask_token", "pooler.weight", "pooler.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert "poolers" in row(result, "head.weight").why
    assert "mask tokens" in row(result, "mask_token").why
    assert row(result, "types.weight").state == REACTS  # by one row of two


def test_dead_units() -> None:
    model = seeded(Encoder)
    with torch.no_grad():
        model.layer[0].weight.zero_()
        model.layer[0].bias.fill_(-50.0)
    result = zokern.check(model, lambda: model()[0].square().mean())
    assert result.ok, str(result)
    assert row(result, "layer.2.weight").state == NO_EFFECT
    assert "dead units" in row(result, "layer.2.weight").why
    assert row(result, "layer.2.bias").state == REACTS


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self) -> Tensor:
        x = torch.linspace(-1, 1, 12).reshape(2, 6)
        return (self.base(x) + self.b(self.a(x))).square().mean()


def test_a_fresh_lora_pair() -> None:
    """B is 0, so A has no effect yet."""
    model = seeded(Adapted)
    with torch.no_grad():
        model.b.weight.zero_()
    result = zokern.check(model, model)
    assert result.ok, str(result)
    assert "LoRA" in row(result, "a.weight").why
    assert row(result, "b.weight").state == REACTS
    assert {one.name: one.why for one in result.not_trained} == {
        "base.weight": "requires_grad is False",
        "base.bias": "requires_grad is False",
    }


@pytest.mark.parametrize("engine", ["trace", "export", "functional"])
def test_engines_that_share_memory(engine: str) -> None:
    model, x = seeded(Norms), inputs()
    run = made(engine, model, x)
    result = zokern.check(model, lambda: run(x).square().mean(), placement="inplace")
    assert result.ok, str(result)
    assert {one.state for one in result.rows} == {REACTS}


def test_the_fast_path_of_torchs_transformer() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2))
    x = torch.linspace(-1, 1, 30).reshape(1, 5, 6)
    result = zokern.check(model, lambda: model(x).square().mean())
    assert result.ok, str(result)


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
def test_parametrizations(placement: str) -> None:
    model = models.linear(6, 8, 3).eval()
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    result = zokern.check(model, lambda: model(x).square().mean(), placement=placement)
    assert result.ok, str(result)
    assert {one.state for one in result.rows} == {REACTS}


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(seeded(models.Net), peft.LoraConfig(target_modules=["head"], r=2))
    tokens = torch.arange(6).reshape(2, 3)
    result = zokern.check(model, lambda: model(tokens).square().mean())
    assert result.ok, str(result)
    assert result.trainable == 2
    (without,) = result.without_effect
    assert "lora_A" in without.name

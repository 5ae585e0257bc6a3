"""placement="forward" on models of many architectures: the losses of materialised weights, and the updates of shadow."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.placement import architectures
from zokern.noise import derive_seed
from zokern.placement import plus

transformers = pytest.importorskip("transformers")
EPS, SEED = 0.02, 7
# Matrices that something else than a product or a lookup uses, and why; all others take directions in the forward.
COPIED: dict[str, str] = {
    "GPT-OSS": r"\.experts\..*_bias",  # of all experts, looked up by a mask
    "Mamba": r"\.mixer\.A_log",  # of the scan, a power
    "Jamba": r"\.mamba\.A_log",
    "DeBERTa": r"\.rel_embeddings\.weight",  # normalised as it is
    "ViT": r"\.position_embeddings",  # added
    "Swin": r"\.relative_position_bias_table",
    "Whisper": r"\.conv[12]\.weight|\.embed_positions\.weight",
    "Wav2Vec2": r"\.conv\.(weight|parametrizations)",
    "nn.TransformerEncoder": r"\.self_attn\.(in_proj_weight|out_proj\.weight)",  # handed over, not called
}
if plus.RELEASE < (2, 11):  # transformers has an operator of its own there, in the place of grouped_mm
    for moe in ("GPT-OSS", "Jamba", "Qwen3-MoE", "Qwen3-Next", "Mixtral", "DeepSeek-V3"):
        COPIED[moe] = r"\.experts\.|" + COPIED.get(moe, "nothing")


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def optimizer(model: nn.Module, placement: str, rank: int) -> zokern.MeZO:
    return zokern.MeZO(model, 1e-4, eps=EPS, seed=SEED, distribution=zokern.LowRank(rank), placement=placement)


def losses_of(opt: zokern.MeZO, model: nn.Module, loss: Any) -> list[Tensor]:
    """Of a step's forwards, whose losses the optimizer is not told: its update is the same for any placement."""
    seen: list[Tensor] = []
    told = iter([1.25, 0.5] * 8)

    def closure() -> Tensor:
        seen.append(loss(model).detach().clone())
        return torch.tensor(next(told))

    opt.step(closure)
    return seen[-2:]


@pytest.mark.parametrize(
    ("name", "rank"), [(name, 1) for name in architectures.NAMES] + [("Llama", 3), ("GPT-OSS", 3), ("T5", 3)]
)
def test_losses_and_updates_are_those_of_materialised_weights(name: str, rank: int) -> None:
    model, loss = architectures.build(name)
    with torch.no_grad():
        here = loss(model)
    assert torch.isfinite(here)
    other = copy.deepcopy(model)
    opt = optimizer(other, "forward", rank)
    losses_of(opt, other, loss)  # what is not a product is found in the first step, and told
    first = {name: p.detach().clone() for name, p in other.named_parameters()}
    shadowed = copy.deepcopy(model)
    shadow = optimizer(shadowed, "shadow", rank)
    losses_of(shadow, shadowed, loss)
    assert all(torch.equal(p, first[name]) for name, p in shadowed.named_parameters())
    for _ in range(2):
        mine, theirs = losses_of(opt, other, loss), losses_of(shadow, shadowed, loss)
        for a, b in zip(mine, theirs, strict=True):
            assert abs(float(a) - float(b)) <= 4e-6 * abs(float(b)), (float(a), float(b))
        assert max(abs(float(a) - float(here)) for a in mine) > 1e-4 * abs(float(here))  # they are perturbed
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), shadowed.parameters(), strict=True))
    wanted = re.compile(COPIED.get(name, "nothing"))
    assert all(wanted.search(copied) for copied in opt._placement.copied), opt._placement.copied
    assert bool(opt._placement.copied) == (name in COPIED)


def test_materialised_by_hand() -> None:
    """What "shadow" shows is W + eps z, and z is the contract's."""
    model, loss = architectures.build("Llama")
    opt = optimizer(model, "forward", 1)
    seed = derive_seed(SEED, 0, 0)
    by_hand = copy.deepcopy(model)
    zokern.add_noise_(
        [p.detach() for p in by_hand.parameters()], tensor_ids=range(len(list(by_hand.parameters()))), seeds=[seed],
        coefs=[EPS], distribution="lowrank:1",
    )  # fmt: skip
    with torch.no_grad():
        wanted = float(loss(by_hand))
    plus, _ = losses_of(opt, model, loss)
    assert abs(float(plus) - wanted) <= 4e-6 * wanted


def test_a_lookup_that_writes_to_its_weight_gets_a_copy() -> None:
    """max_norm scales the rows that are looked up, in place: in the sum written out, as under shadow."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Parameter(torch.randn(12, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.embedding(ids, self.table, max_norm=1.0).square().sum()

    ids, found = torch.tensor([1, 5, 1]), {}
    for placement in ("forward", "shadow"):
        model = Looked()
        opt = optimizer(model, placement, 1)
        losses = [losses_of(opt, model, lambda m: m(ids)) for _ in range(2)]
        found[placement] = [*map(torch.stack, losses), model.table.detach()]
    for mine, theirs in zip(found["forward"], found["shadow"], strict=True):
        assert torch.equal(mine, theirs)
    assert float(found["forward"][0].max()) == pytest.approx(3.0, abs=1e-4)  # three rows of norm 1

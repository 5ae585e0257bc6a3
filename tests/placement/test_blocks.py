"""Blocks of rows, each with its own direction: transformers, adapters and generation, against one probe after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import seeded
from zokern._checks import ZokernWarning
from zokern.optim.losses import Losses
from zokern.placement import blocks

transformers = pytest.importorskip("transformers")

V, B, T = 41, 3, 7
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
WORDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
# The model's and its configuration's class, their settings, and what has no way of its own for all blocks at once.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**SIZES, **WORDS}, set()),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**SIZES, **WORDS}, set()),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": V, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 20}, set(),
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}, set()),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {**WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 20,
         "max_position_embeddings": 32, "word_embed_proj_dim": 16}, set(),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **WORDS}, set()),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, **WORDS, "head_dim": 8, "num_key_value_heads": 1}, set()),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SIZES, **WORDS, "head_dim": 8, "num_key_value_heads": 1}, set()),
    "phi": ("PhiForCausalLM", "PhiConfig", {**SIZES, **WORDS}, set()),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**WORDS, **T5}, {"scaled_dot_product_attention"}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 8, "patch_size": 4}, {"conv2d"}),
}  # fmt: skip


def made(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    model, config, settings, _ = ARCHITECTURES[name]
    return seeded(lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)), dtype, 0.1)


def batch(name: str) -> dict[str, Tensor]:
    """The second example is padded on its left."""
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return {"pixel_values": torch.randn(B, 3, 8, 8, generator=generator)}
    ids, mask = torch.randint(3, V, (B, T), generator=generator), torch.ones(B, T, dtype=torch.long)
    if name not in ("bert", "roberta", "distilbert", "t5"):
        ids[1, :2], mask[1, :2] = 0, 0
    more = {"decoder_input_ids": ids[:, :4]} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def of_each(model: nn.Module) -> Callable[[Any], Tensor]:
    def closure(one: Any) -> Tensor:
        logits = model(**one).logits.float()
        return logits.flatten(1).log_softmax(-1)[:, 1]

    return closure


@pytest.fixture
def rounds(monkeypatch):
    """The losses of each round, as the method gets them."""
    noted: list[list[float]] = []
    gather = Losses.gather
    monkeypatch.setattr(
        Losses, "gather", lambda self, losses: (noted.append([float(x) for x in losses]), gather(self, losses))[1]
    )
    return noted


@pytest.fixture
def block_by_block(monkeypatch):
    """Functions that were done block by block."""
    names: set[str] = set()
    usual = blocks.block_by_block
    monkeypatch.setattr(
        blocks, "block_by_block", lambda f, args, named: (names.add(f.__name__), usual(f, args, named))[1]
    )
    return names


@pytest.fixture(autouse=True)
def told_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZokernWarning)
        yield


def twice(model: nn.Module, closure: Any, given: Any, rank: int = 1, eps: float = 1e-2, method: str = "ES") -> Any:
    """A step that tests, and the same step again."""
    options = {"num_directions": 3, "maximize": True} if method == "ES" else {"candidates": 3}
    opt = getattr(zokern, method)(
        model, 0.0, eps=eps, placement="forward", distribution=zokern.LowRank(rank), **options
    )
    opt.step(closure, [given], batched=True)
    opt.resumed(0, 0)
    opt.step(closure, [given], batched=True)
    return opt


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers(name, rounds, block_by_block):
    model = made(name)
    opt = twice(model, of_each(model), batch(name), method="FZOO")
    alone, together = rounds
    assert float(opt.metrics["probes_per_forward"]) == 4
    assert max(alone) - min(alone) > 1e-3
    assert all(abs(a - b) <= 2e-6 * abs(a) for a, b in zip(alone, together, strict=True))
    assert block_by_block <= ARCHITECTURES[name][3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_in_16_bits(dtype, rounds):
    model = made("llama", dtype)
    assert float(twice(model, of_each(model), batch("llama"), rank=2).metrics["probes_per_forward"]) == 3
    assert all(abs(a - b) <= 1e-2 * abs(a) for a, b in zip(*rounds, strict=True))


def test_a_cache_in_the_batch(rounds):
    """Keys and values of a prompt are repeated in the blocks' order, and each forward gets its own."""
    model, ids = made("llama"), batch("gpt2")["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
    twice(model, of_each(model), {"input_ids": ids[:, 3:], "past_key_values": cache})
    assert cache.get_seq_length() == 3


def test_adapters(rounds):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model = seeded(lambda: model, spread=0.05)
    opt = twice(model, of_each(model), batch("llama"))
    assert float(opt.metrics["probes_per_forward"]) == 3
    assert all(abs(a - b) <= 2e-6 * abs(a) for a, b in zip(*rounds, strict=True))


def test_biases_alone(rounds):
    """Frozen matrices, and a bias for each block; the smallest matrix is trained, so that there is one."""
    model = made("bert")
    for name, p in model.named_parameters():
        p.requires_grad_("bias" in name or name == "classifier.weight")
    opt = twice(model, of_each(model), batch("bert"))
    assert float(opt.metrics["probes_per_forward"]) == 3
    assert all(abs(a - b) <= 2e-6 * abs(a) for a, b in zip(*rounds, strict=True))


# ----------------------------------------------------------------------------------------------------------- generation


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 2},
}


def reward(model: Any, seen: list[int], **how: Any) -> Callable[[Any], list[float]]:
    """Of the words of each row: it may end before others do, which fill it up with 0."""

    def closure(one: Any) -> list[float]:
        written = model.generate(**one, max_new_tokens=6, **how)[:, T:]
        seen.append(len(written))
        return [sum(float(word * (i + 1) % 7) for i, word in enumerate(row) if word > 2) for row in written.tolist()]

    return closure


@pytest.mark.parametrize(("name", "way"), [("llama", way) for way in WAYS] + [("gpt2", "greedy"), ("opt", "greedy")])
def test_a_population_generates_in_one_batch(name, way, rounds):
    model, seen = made(name), []
    given = batch(name)
    opt = twice(model, reward(model, seen, **WAYS[way]), given, eps=0.1)
    assert seen[-1] == 3 * B
    assert opt.counters["forwards"] == 3 + 2 + 2 + 1
    assert rounds[0] == rounds[1]
    assert len(set(rounds[0])) > 1


def test_sampled_rows_draw_their_own_and_each_has_its_direction():
    model, seen = made("llama"), []
    torch.manual_seed(3)
    opt = twice(model, reward(model, seen, do_sample=True), batch("llama"), eps=0.1)
    assert float(opt.metrics["probes_per_forward"]) == 3


def test_experts_that_gather_rows_are_evaluated_one_after_another():
    settings = {**SIZES, **WORDS, "num_key_value_heads": 1, "num_local_experts": 4}
    model = seeded(lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings)))
    with pytest.warns(ZokernWarning, match="evaluated one after another"):
        opt = twice(model, of_each(model), batch("llama"))
    assert float(opt.metrics["probes_per_forward"]) == 1

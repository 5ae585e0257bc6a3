"""The toy models of the suite, each made so that every tensor differs from every other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

WIDTH, WORDS, BLOCKS = 6, 11, 4
Module = TypeVar("Module", bound=nn.Module)


def seeded(
    build: Callable[[], Module],
    dtype: torch.dtype | None = None,
    spread: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Module:
    """A model for evaluation. Biases and norms start at 0 and 1, which would hide what is not perturbed: all are moved."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(spread * torch.randn(p.shape))
    return model.to(device) if dtype is None else model.to(device, dtype)


# ------------------------------------------------------------------------------------------- embedding, blocks, tied head


class Block(nn.Module):
    """Modules with weights, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.inner(self.norm(x)))


class Experts(nn.Module):
    """A list of equal modules inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + torch.tanh(sum(expert(y) for expert in self.experts))


class Toy(nn.Module):
    """A language model: blocks between an embedding and the head tied to it, a norm outside; each token's label is the
    one before."""

    def __init__(self, block: Callable[[], nn.Module] = Block, tied: bool = True, depth: int = BLOCKS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        tokens = torch.arange(WORDS) if tokens is None else tokens
        x = self.head(self.norm(self.run(self.embedding(tokens))))
        return nn.functional.cross_entropy(x.double(), tokens.roll(1))


def toy(dtype: torch.dtype = torch.float32) -> Toy:
    return seeded(Toy, dtype)


def small(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Toy:
    """13 tensors, 198 weights, two blocks."""
    return seeded(lambda: Toy(depth=2), dtype, 0.3, seed, device)


def tokens(step: int) -> Tensor:
    return torch.randint(WORDS, (24,), generator=torch.Generator().manual_seed(100 + step))


# ----------------------------------------------------------------------------------------------------------- other shapes


class Net(nn.Module):
    """Batches of tokens to classes; its blocks' order can be turned round."""

    def __init__(self, depth: int = 4, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    backwards = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in reversed(self.layers) if self.backwards else self.layers:
            x = x + layer(x)
        return self.head(x.mean(dim=1))


class Attending(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    """About 1900 parameters; the head is tied to the embedding."""

    def __init__(self, vocabulary: int = 17, width: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Attending(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())


def transformer(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Transformer:
    return seeded(Transformer, dtype, 0.05, seed, device)


def sentences(step: int, device: str = "cpu") -> Tensor:
    """A batch for the transformer."""
    return torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(100 + step)).to(device)


class Mixed(nn.Module):
    """bfloat16 and float32 weights, one tied pair, an LSTM: a pass is two launches, and LSTM needs its flat weights set."""

    def __init__(self, sixteen: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.lstm = nn.LSTM(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        if sixteen:
            self.embedding.bfloat16()

    def forward(self) -> Tensor:
        tokens = torch.arange(7)
        x = self.norm(self.lstm(self.embedding(tokens).float())[0])
        return nn.functional.cross_entropy(nn.functional.linear(x, self.head.weight.float()), tokens.roll(1))


class Quadratic(nn.Module):
    """No blocks, float64, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
        self.blocks = nn.ModuleList()

    def forward(self) -> Tensor:
        return (self.a.square().sum() - 1.0).square() + (self.b + 0.5).square().sum() + self.frozen.sum()


def linear(*sizes: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).to(dtype)


def filled(n: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.full((n,), 0.5, dtype=dtype))


def bits(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16).clone()


def all_bits(module: nn.Module) -> list[Tensor]:
    return [bits(p) for p in module.parameters()]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------- Hugging Face's, and small

SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 19}


class Language(nn.Module):
    """A Hugging Face model and its loss on a fixed batch."""

    def __init__(self, build: Callable[[Any], nn.Module], target: str = "tokens") -> None:
        super().__init__()
        self.model = build(pytest.importorskip("transformers"))
        self.target = target

    def forward(self) -> Tensor:
        tokens = torch.arange(14).reshape(2, 7) + 2
        labels = torch.tensor([0, 1]) if self.target == "class" else tokens
        logits = self.model(input_ids=tokens, labels=labels).logits.double()  # a 16-bit loss would hide differences
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def decoder(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    def build(tf: Any) -> nn.Module:
        config = getattr(tf, f"{name}Config")(num_hidden_layers=3, max_position_embeddings=16, **SMALL, **options)
        return getattr(tf, f"{name}ForCausalLM")(config)

    return build


def opt(tf: Any) -> nn.Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=19,
            hidden_size=8,
            num_hidden_layers=3,
            ffn_dim=16,
            num_attention_heads=2,
            max_position_embeddings=16,
            word_embed_proj_dim=8,
        )
    )


def gpt2(tf: Any) -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=19, n_embd=8, n_layer=3, n_head=2, n_positions=16))


def encoder(name: str) -> Callable[[Any], nn.Module]:
    def build(tf: Any) -> nn.Module:
        config = getattr(tf, f"{name}Config")(num_hidden_layers=3, max_position_embeddings=16, **SMALL)
        return getattr(tf, f"{name}ForSequenceClassification")(config)

    return build


def t5(tf: Any) -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=19,
            d_model=8,
            d_kv=4,
            d_ff=16,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {
    "OPT": lambda: Language(opt),
    "LLaMA": lambda: Language(decoder("Llama", num_key_value_heads=1)),
    "Qwen2": lambda: Language(decoder("Qwen2", num_key_value_heads=1, tie_word_embeddings=True)),
    "GPT-2": lambda: Language(gpt2),
    "BERT": lambda: Language(encoder("Bert"), "class"),
    "T5": lambda: Language(t5),
}

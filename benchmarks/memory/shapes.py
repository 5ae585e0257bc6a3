"""Shapes of Llama's kind, and what follows from them without a model: numbers, blocks, bytes. Exact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama. hidden, inner: widths of the residual stream and of the MLP; heads, kv: of queries, of keys and values."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv: int
    tied: bool = False

    @property
    def head(self) -> int:
        """Width of one."""
        return self.hidden // self.heads

    @property
    def keys(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv * self.head

    @property
    def block(self) -> int:
        """Numbers of a layer: queries and output, keys and values, the MLP's three, two norms."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.keys
        return attention + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def outside(self) -> int:
        """Numbers outside the layers: the embedding, the last norm, and the head where it is not the embedding."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.outside

    @property
    def largest(self) -> int:
        """Numbers of the largest tensor."""
        return self.hidden * max(self.vocabulary, self.inner)

    @property
    def sides(self) -> int:
        """Rows and columns of all matrices: the numbers of a direction of rank 1."""
        h, k, i = self.hidden, self.keys, self.inner
        layer = 4 * h + 2 * (h + k) + 3 * (h + i)
        return self.layers * layer + (self.vocabulary + h) * (1 if self.tied else 2)

    @property
    def norms(self) -> int:
        """Numbers of all that is no matrix."""
        return self.hidden * (2 * self.layers + 1)

    def adapter(self, rank: int) -> int:
        """Numbers of LoRA on queries and values, PEFT's choice for Llama."""
        return self.layers * rank * (2 * self.hidden + self.hidden + self.keys)

    def configuration(self) -> Any:
        """transformers' of this shape."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv,
            tie_word_embeddings=self.tied,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "parameters": self.parameters}


# Measured; the last is that of SmolLM2-135M.
SMALL = {
    "10M": Shape(8192, 256, 768, 10, 4, 2, tied=True),
    "28M": Shape(16384, 384, 1152, 12, 6, 3, tied=True),
    "67M": Shape(32000, 512, 1536, 10, 8, 8),
    "135M": Shape(49152, 576, 1536, 30, 9, 3, tied=True),
}
# Computed: Llama-3.2-1B, Llama-2-7B, 13B, 70B.
LARGE = {
    "1B": Shape(128256, 2048, 8192, 16, 32, 8, tied=True),
    "7B": Shape(32000, 4096, 11008, 32, 32, 32),
    "13B": Shape(32000, 5120, 13824, 40, 40, 40),
    "70B": Shape(32000, 8192, 28672, 80, 64, 8),
}

"""Five published models' shapes, of five makes, that placements are measured on. Random weights, as transformers has them.

Between them: one stack of blocks and two; a head that is the embedding and one of its own; products with and without
biases, and GPT-2's three in one; keys of fewer heads; positions that are learnt; norms of both kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Whatever a configuration calls it: those that have another name for it know this one too, or do without.
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "word_embed_proj_dim": 16, "d_kv": 8, "d_ff": 32, "intermediate_size": 32,
    "ffn_dim": 32, "num_hidden_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """kind: transformers' name of the architecture; settings: of its configuration, where they are not its defaults."""

    kind: str
    settings: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def tiny(self) -> Model:
        """The same architecture, of two layers."""
        return replace(self, settings=self.settings | SMALL)

    def configuration(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.kind, **self.settings)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Without dropout."""
        import transformers

        auto: Any = {
            "roberta": transformers.AutoModelForSequenceClassification, "t5": transformers.AutoModelForSeq2SeqLM,
        }.get(self.kind, transformers.AutoModelForCausalLM)  # fmt: skip
        torch.manual_seed(0)
        made: nn.Module = auto.from_config(self.configuration(), dtype=dtype).eval()
        return made

    def closure(self, model: nn.Module, rows: int, length: int) -> Callable[[], Tensor]:
        """The cross entropy of two classes, or of two words after the last token: logits of one token a row."""
        configuration: Any = model.config
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, configuration.vocab_size, (rows, length), generator=generator)
        targets = torch.arange(rows) % 2
        asked: dict[str, Any] = {"input_ids": ids}
        if self.kind == "t5":
            asked["decoder_input_ids"] = ids[:, :1]
        if self.kind != "roberta":
            asked["use_cache"] = False
        if self.kind not in ("roberta", "t5"):
            asked["logits_to_keep"] = 1

        def loss() -> Tensor:
            logits = model(**asked).logits.reshape(rows, -1)
            return F.cross_entropy(logits[:, :2].float(), targets)

        return loss


MODELS = {
    "GPT-2": Model("gpt2", {}),
    "T5-base": Model(
        "t5", {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128},
    ),
    "RoBERTa-large": Model(
        "roberta",
        {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
        },
    ),
    "Qwen2.5-0.5B": Model(
        "qwen2",
        {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "OPT-1.3B": Model(
        "opt",
        {
            "hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "vocab_size": 50272,
        },
    ),
}  # fmt: skip
# Of all parameters, a head for two classes included.
NUMBERS = {
    "GPT-2": 124_439_808, "T5-base": 222_903_552, "RoBERTa-large": 355_361_794, "Qwen2.5-0.5B": 494_032_768,
    "OPT-1.3B": 1_315_758_080,
}  # fmt: skip

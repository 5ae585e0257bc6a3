"""Models to time steps with: shapes of known ones by name, random weights, Hugging Face's own classes, no network.

Decoders have a causal language model's loss. "demo" has the shape of the sentence encoder that `zokern finetune` tunes,
with that task's kind of loss. Weights are made on the device in their dtype, with no float32 detour, so that 13 billion
bfloat16 parameters take 26 GB from the first moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CLASSES, TEMPERATURE = 7, 0.05  # of the encoder's loss, as in the demo
UNMASKED = "zokern-sdpa-without-mask"


@dataclass(frozen=True)
class Shape:
    """A model's dimensions; `longest`: tokens of a row; `inner`: width of the feed-forward layers."""

    family: str  # opt, qwen3 or bert
    hidden: int
    layers: int
    heads: int
    inner: int
    vocab: int
    longest: int
    kv_heads: int = 0
    head_dim: int = 0
    tied: bool = True


MODELS: dict[str, Shape] = {
    "demo": Shape("bert", 384, 6, 12, 1536, 30522, 512),
    "opt-125m": Shape("opt", 768, 12, 12, 3072, 50272, 2048),
    "opt-1.3b": Shape("opt", 2048, 24, 32, 8192, 50272, 2048),
    "opt-13b": Shape("opt", 5120, 40, 40, 20480, 50272, 2048),
    "qwen-0.6b": Shape("qwen3", 1024, 28, 16, 3072, 151936, 40960, kv_heads=8, head_dim=128),
    "qwen-8b": Shape("qwen3", 4096, 36, 32, 12288, 151936, 40960, kv_heads=8, head_dim=128, tied=False),
    "tiny-opt": Shape("opt", 16, 2, 2, 32, 64, 64),
    "tiny-qwen": Shape("qwen3", 16, 2, 2, 32, 64, 64, kv_heads=1, head_dim=8),
    "tiny-encoder": Shape("bert", 16, 2, 2, 32, 64, 64),
}


def attention() -> str:
    """The name of the models' attention: transformers' SDPA, by a name for which transformers makes no masks.

    Batches here have no padding, so a mask says nothing. But transformers looks at its values (or at the positions, for
    packed rows) to see whether SDPA can do without, and each eager forward would wait for the device. While a stream is
    capturing it does not look and hands the mask over: a graph would hold other kernels than the eager steps beside it.
    """
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        return "as transformers chooses"  # its models have classes of their own for each attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    return UNMASKED


def _construct(shape: Shape) -> nn.Module:
    import transformers

    if shape.family == "qwen3" and not hasattr(transformers, "Qwen3Config"):
        raise ValueError(
            f"transformers {transformers.__version__} has no Qwen3; install 4.51 or later, or choose an OPT"
        )
    kind, own = {
        "opt": ("ForCausalLM", {"ffn_dim": shape.inner, "word_embed_proj_dim": shape.hidden}),
        "qwen3": ("ForCausalLM", {
            "intermediate_size": shape.inner, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
            "tie_word_embeddings": shape.tied,
        }),
        "bert": ("Model", {"intermediate_size": shape.inner}),
    }[shape.family]  # fmt: skip
    name = {"opt": "OPT", "qwen3": "Qwen3", "bert": "Bert"}[shape.family]
    config = getattr(transformers, f"{name}Config")(
        **({"attn_implementation": UNMASKED} if attention() == UNMASKED else {}),
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, max_position_embeddings=shape.longest, use_cache=False, **own,
    )  # fmt: skip
    pooler = {"add_pooling_layer": False} if shape.family == "bert" else {}  # nothing here would train one
    model: nn.Module = getattr(transformers, name + kind)(config, **pooler)
    return model.eval()


@contextlib.contextmanager
def making(dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[None]:
    """New tensors have `dtype` and lie on `device`; torch's generators start at `seed` and are put back afterwards."""
    import torch

    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[] if device.type != "cuda" else [index]), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def build(name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """The model called `name` with random weights as transformers draws them, in eval mode: no dropout."""
    with making(dtype, device, seed):
        return _construct(MODELS[name])


def parameters(name: str) -> int:
    """The number of parameters of a model, tied ones once. Allocates nothing."""
    import torch

    model = build(name, torch.float32, torch.device("meta"))
    return sum(p.numel() for p in model.parameters())


def logits_bytes(name: str, rows: int, length: int, itemsize: int) -> int:
    """The largest activation of a forward: a decoder's logits, as they are, in float32, and their softmax; else 0."""
    shape = MODELS[name]
    return 0 if shape.family == "bert" else rows * length * shape.vocab * (itemsize + 4 + 4)


@dataclass(frozen=True)
class Work:
    """A closure that keeps apart what a step reads anew: calling it is loss(batch), a tensor on the batch's device.
    each: the losses [rows] of the same batch, whose mean that is."""

    loss: Callable[[Mapping[str, Tensor]], Tensor]
    batch: dict[str, Tensor]
    each: Callable[[Mapping[str, Tensor]], Tensor]

    def __call__(self) -> Tensor:
        return self.loss(self.batch)


def closure(name: str, model: nn.Module, rows: int, length: int, device: torch.device, seed: int = 0) -> Work:
    """closure() -> the loss of one batch of rows x length random tokens, the same batch each time, all of it on `device`.

    A decoder's is the mean cross entropy of the next token. An encoder's: rows are averaged over their tokens, compared by
    cosine with seven fixed random vectors, and the cross entropy of a random class taken at temperature 0.05.
    """
    import torch
    import torch.nn.functional as F

    shape = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocab, (rows, length), generator=generator).to(device)
    if shape.family != "bert":

        def of_decoder(batch: Mapping[str, Tensor]) -> Tensor:
            loss: Tensor = model(input_ids=batch["ids"], labels=batch["ids"]).loss
            return loss

        def each_of_decoder(batch: Mapping[str, Tensor]) -> Tensor:
            logits = model(input_ids=batch["ids"]).logits[:, :-1].float()
            return F.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none").mean(1)

        return Work(of_decoder, {"ids": ids}, each_of_decoder)
    targets = torch.randint(CLASSES, (rows,), generator=generator).to(device)
    centres = F.normalize(torch.randn(CLASSES, shape.hidden, generator=generator), dim=-1).to(device)

    def each_of_encoder(batch: Mapping[str, Tensor]) -> Tensor:
        hidden = model(input_ids=batch["ids"]).last_hidden_state.float()
        scores = F.normalize(hidden.mean(1), dim=-1) @ centres.T / TEMPERATURE
        return F.cross_entropy(scores, batch["targets"], reduction="none")

    def of_encoder(batch: Mapping[str, Tensor]) -> Tensor:
        return each_of_encoder(batch).mean()

    return Work(of_encoder, {"ids": ids, "targets": targets}, each_of_encoder)

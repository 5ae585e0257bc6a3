#!/usr/bin/env bash
# A forward of transformers' models with SDPA makes the host wait for the GPU, to look at the attention mask.
#
# SDPA is faster without a mask, so transformers asks of a two-dimensional mask whether all of it is ones. In every
# forward the host needs that value of the device. To leave the mask out does not always help: Qwen3 then looks whether
# the positions are those of packed rows, and reads as well. While a stream is capturing nothing may be read. The mask is
# then handed over, is_causal is false, and SDPA takes other kernels than in the eager steps beside the graph: other bits,
# and no flash attention.
#
# It matters to whoever queues forwards without backward passes in between, as zeroth-order methods and decoding loops do.
# Also to whoever compares captured steps with eager ones, or runs under torch.cuda.set_sync_debug_mode("error"). What
# helps: a mask function of one's own, registered with AttentionMaskInterface, that calls transformers' sdpa_mask with
# allow_is_causal_skip=False and, for encoders, allow_is_bidirectional_skip=False.
#
# In zokern: the command has such a mask function (docs/finetune.md#on-a-gpu); for captured steps see docs/graphs.md.
#
# Seen in transformers 5.24.0 (5.17.0 reads a mask of ones as well), torch 2.13.0 on a CPU, where reads can be counted and
# a capture pretended. Needs python3 with venv.
# Subject: fine-tuning frameworks
# 2026-11-27
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy

cat > look.py <<'PY'
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

print("transformers", transformers.__version__, "torch", torch.__version__)


class Reads(TorchDispatchMode):
    """Counts the values that the host reads out of tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name().startswith("aten::_local_scalar_dense")
        return func(*args, **(kwargs or {}))


size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "use_cache": False}
opt = transformers.OPTForCausalLM(transformers.OPTConfig(**size, word_embed_proj_dim=16, ffn_dim=32)).eval()
qwen = transformers.Qwen3ForCausalLM(
    transformers.Qwen3Config(**size, intermediate_size=32, num_key_value_heads=1, head_dim=8)
).eval()
ids = torch.arange(8).view(2, 4)
real = torch.nn.functional.scaled_dot_product_attention
seen = []


def spy(*args, **options):
    mask = options.get("attn_mask")
    seen.append((None if mask is None else f"{mask.dtype} {list(mask.shape)}", options.get("is_causal")))
    return real(*args, **options)


torch.nn.functional.scaled_dot_product_attention = spy


def forward(model, **given):
    seen.clear()
    with torch.no_grad(), Reads() as reads:
        model(input_ids=ids, **given)
    return reads.count, seen[0]


ones = {"attention_mask": torch.ones_like(ids)}
found = {
    "OPT, no mask": forward(opt),
    "OPT, a mask of ones": forward(opt, **ones),
    "Qwen3, no mask": forward(qwen),
    "Qwen3, a mask of ones": forward(qwen, **ones),
}
import_utils.is_cuda_stream_capturing = lambda: True
found["OPT, a mask of ones, as if capturing"] = forward(opt, **ones)
for name, (reads, attention) in found.items():
    print(f"{name}: {reads} read(s) on the host; SDPA gets attn_mask, is_causal = {attention}")
assert [reads for reads, _ in found.values()] == [0, 1, 1, 1, 0], "the reads have changed"
causal = (None, True)
assert [attention == causal for _, attention in found.values()] == [True] * 4 + [False], "the attention has changed"
PY
venv/bin/python look.py
echo "seen: a forward reads its mask, unless it is being captured, when it computes another attention"

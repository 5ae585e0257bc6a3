#!/usr/bin/env bash
# On CPUs with AVX512-BF16, state_dict() of a 4-bit bitsandbytes layer disorders its scales, saved and in memory.
#
# There the first forward in evaluation mode packs a 4-bit weight anew for a faster kernel. Codes get another order;
# scales (absmax, one for each 64 weights) are transposed and rounded to bfloat16. state_dict() undoes this for the codes.
# The scales it leaves as they are, unless they are quantised themselves (double quantisation). So what is saved pairs
# codes with other blocks' scales. The next forward packs once more and transposes once more, so the model in memory is
# changed too. Saving an adapter of PEFT calls state_dict(), which spoils the base model under it.
#
# It matters to whoever evaluates on a CPU and saves after it, or evaluates and saves in turn. Double quantisation is off
# by default. A layer whose rows have 64 columns, one block each, does not show it. What helps:
# bnb_4bit_use_double_quant=True; support_avx512bf16_for_cpu = False on every Linear4bit before the first forward; or to
# save before it.
#
# In zokern: the command, ZOTrainer and accelerate's prepare() switch the packing off (docs/lora.md#quantised-bases).
#
# Seen in bitsandbytes 0.50.2 with torch 2.13.0, peft 0.21.2 and transformers 5.24.0, on an AMD EPYC. Needs python3 with
# venv, and a CPU with AVX512-BF16 (avx512_bf16 in /proc/cpuinfo; others never pack).
# Subject: PyTorch, compilers and number formats
# 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 peft==0.21.2 \
  transformers==5.24.0

cat > seen.py <<'PYTHON'
import bitsandbytes
import peft
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

torch.manual_seed(0)
linear = torch.nn.Linear(256, 64, bias=False)
linear.weight.data *= torch.arange(1, 65)[:, None]  # rows of different size
x = torch.randn(8, 256)


@torch.no_grad()
def error(layer):
    """The output's distance from the unquantised layer's, over that one's norm."""
    right = linear(x)
    return f"{((layer(x) - right).norm() / right.norm()).item():.1f}"


def quantised(nested=False):
    layer = Linear4bit(256, 64, bias=False, compress_statistics=nested, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").eval()


def loaded(saved):
    layer = Linear4bit(256, 64, bias=False)
    rest = {name.removeprefix("weight."): value for name, value in saved.items() if name != "weight"}
    layer.weight = Params4bit.from_prequantized(saved["weight"], rest, device="cpu")
    return layer.train()  # which never packs


print("torch", torch.__version__.split("+")[0], "bitsandbytes", bitsandbytes.__version__, "peft", peft.__version__)
if not quantised().support_avx512bf16_for_cpu:
    raise SystemExit("this CPU has no AVX512-BF16, or bitsandbytes does not see it: nothing can be shown here")
layer = quantised()
print("error, saved before a forward and loaded:", error(loaded(layer.state_dict())))
print("error of a forward:", error(layer))
saved = layer.state_dict()
print("saved scales:", tuple(saved["weight.absmax"].shape), saved["weight.absmax"].dtype)
print("error, saved after it and loaded:", error(loaded(saved)))
print("error of the next forward:", error(layer))

layer = quantised(nested=True)
print("doubly quantised, error before and after:", error(layer), bool(layer.state_dict()) and error(layer))
layer = quantised()
layer.support_avx512bf16_for_cpu = False
print("never packed, error before and after:", error(layer), bool(layer.state_dict()) and error(layer))

model = peft.get_peft_model(torch.nn.Sequential(quantised()), peft.LoraConfig(target_modules=["0"])).eval()
before = error(model)
model.save_pretrained("adapter")
print("with an adapter, error before and after it is saved:", before, error(model))
PYTHON
venv/bin/python -W ignore seen.py 2>errors.txt | tee seen.txt || { cat errors.txt; exit 2; }
cat > wanted.txt <<'TEXT'
error, saved before a forward and loaded: 0.1
error of a forward: 0.1
saved scales: (4, 64) torch.bfloat16
error, saved after it and loaded: 0.6
error of the next forward: 0.6
doubly quantised, error before and after: 0.1 0.1
never packed, error before and after: 0.1 0.1
with an adapter, error before and after it is saved: 0.1 0.6
TEXT
tail -n 8 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"

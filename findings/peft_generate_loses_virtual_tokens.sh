#!/usr/bin/env bash
# generate() of a PEFT model with virtual tokens writes another text than the model's own forward says, without a word.
#
# A model with a prefix or a soft prompt writes greedily. Its forward, called once for each new token, says one
# continuation; model.generate says another. With the cache, which is the default, a prefix is left out altogether: the
# text is the base model's, as if nothing had been trained. A soft prompt goes wrong too. Without the cache the soft
# prompt is right and the prefix still is not. LoRA is right both ways. Losses, which are forwards, are of the tuned model
# all the while, so an evaluation by what is written says that tuning was in vain.
#
# It matters to whoever measures prefix or prompt tuning by generated answers (exact match, F1), or trains on rewards for
# what is written. What helps: use_cache=False for soft prompts; or transformers' own generate on the base model, with the
# soft prompt in front as inputs_embeds.
#
# In zokern: the command writes by transformers' own generate (docs/lora.md).
#
# Seen in peft 0.21.2 with transformers 5.24.0 and torch 2.13.0 on a CPU. Needs python3 with venv.
# Subject: fine-tuning frameworks
# 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2

cat > seen.py <<'PYTHON'
import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

TEXT, NEW = torch.tensor([[5, 6, 7, 8]]), 6
config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
)


@torch.no_grad()
def by_forwards(model):
    said = TEXT
    for _ in range(NEW):
        logits = model(input_ids=said, attention_mask=torch.ones_like(said)).logits
        said = torch.cat([said, logits[:, -1:].argmax(-1)], 1)
    return said[0, 4:].tolist()


@torch.no_grad()
def by_generate(model, cache):
    mask = torch.ones_like(TEXT)
    options = {"do_sample": False, "max_new_tokens": NEW, "use_cache": cache, "pad_token_id": 0}
    return model.generate(input_ids=TEXT, attention_mask=mask, **options)[0, 4:].tolist()


print("torch", torch.__version__.split("+")[0], "transformers", transformers.__version__, "peft", peft.__version__)
for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.LoraConfig):
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    plain = by_forwards(base)
    own = {} if kind is peft.LoraConfig else {"num_virtual_tokens": 4}
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", **own)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)  # or it would do nothing
    right = by_forwards(model)
    for cache in (True, False):
        said = by_generate(model, cache)
        print(f"{kind.__name__}, cache {cache}: as the forward {said == right}, as the base {said == plain}")
PYTHON
venv/bin/python -W ignore seen.py 2>errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
cat > wanted.txt <<'TEXT'
PromptTuningConfig, cache True: as the forward False, as the base False
PromptTuningConfig, cache False: as the forward True, as the base False
PrefixTuningConfig, cache True: as the forward False, as the base True
PrefixTuningConfig, cache False: as the forward False, as the base False
LoraConfig, cache True: as the forward True, as the base False
LoraConfig, cache False: as the forward True, as the base False
TEXT
tail -n 6 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"

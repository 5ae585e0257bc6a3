#!/usr/bin/env bash
# generate(generation_config=GenerationConfig(do_sample=False, num_beams=1)) is not plain greedy decoding.
#
# A GenerationConfig of one's own is no whole description. What it leaves out is None, and generate() fills each None from
# the checkpoint's generation_config.json: repetition_penalty and all else that its authors chose. generate()'s
# documentation says that unspecified parameters have GenerationConfig's default values. The keywords do_sample=False,
# num_beams=1 do the same.
#
# It matters to evaluations and comparisons: the "greedy" answers of two checkpoints of one model, or of a base model and
# its fine-tune, are decoded by different rules. What helps: name every field with its neutral value
# (repetition_penalty=1.0, no_repeat_ngram_size=0, ...). Or set model.generation_config to a config of one's own, with its
# special tokens, for there is then nothing to be filled from.
#
# In zokern: the command's answers are greedy whatever that file says (docs/finetune.md#objectives).
#
# Seen in transformers 5.24.0 with torch 2.13.0 on a CPU. Needs python3 with venv.
# Subject: fine-tuning frameworks
# 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 transformers==5.24.0

cat > seen.py <<'PYTHON'
import torch
import transformers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=32, n_embd=8, n_layer=1, n_head=1, **tokens))
model.generation_config = GenerationConfig(repetition_penalty=5.0, **tokens)
model.save_pretrained("model")
model = GPT2LMHeadModel.from_pretrained("model").eval()

prompt = torch.tensor([[1, 2]])
greedy = prompt
with torch.no_grad():
    for _ in range(8):
        greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(dim=-1)], dim=1)


def told(name, written):
    print(f"{name}: the most likely tokens {torch.equal(written, greedy)}")


plain = {"do_sample": False, "num_beams": 1, "max_new_tokens": 8}
config = GenerationConfig(**plain)
print("torch", torch.__version__.split("+")[0], "transformers", transformers.__version__)
print("GenerationConfig's repetition_penalty:", config.repetition_penalty)
told("config", model.generate(prompt, generation_config=config))
told("keywords", model.generate(prompt, **plain))
told("config with repetition_penalty=1.0", model.generate(
    prompt, generation_config=GenerationConfig(repetition_penalty=1.0, **plain)
))
model.generation_config = config
told("config set as the model's", model.generate(prompt))
PYTHON
venv/bin/python -W ignore seen.py 2>errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
cat > wanted.txt <<'TEXT'
GenerationConfig's repetition_penalty: None
config: the most likely tokens False
keywords: the most likely tokens False
config with repetition_penalty=1.0: the most likely tokens True
config set as the model's: the most likely tokens True
TEXT
tail -n 5 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"

#!/usr/bin/env bash
# Prefix tuning of a T5 encoder makes an adapter that has no effect, and PEFT does not say so.
#
# A prefix comes to a model as past_key_values, keys and values from an earlier call. Decoders of transformers have such
# calls, T5's encoder has not: T5EncoderModel takes the argument among its **kwargs and drops it. get_peft_model accepts
# the model, the forward runs, and its output does not depend on the prefix. A T5Model as feature extraction has the
# prefix in its decoder only, and its encoder's output stays the same. BERT's encoder, by contrast, looks at the prefix.
# With a mask that has a 0 in it the T5 encoder raises instead, about sizes of tensors, since PEFT has made the mask
# longer and nothing else.
#
# It matters to whoever tunes a sentence encoder of T5's kind. Forward-only training never notices, and with
# backpropagation a head beside the prefix learns alone. What helps: PromptTuningConfig, which puts embeddings before the
# text, or LoRA; and one look whether the output moves when the adapter does.
#
# In zokern: the command refuses such a model; in Python, zokern.check says that the loss does not react (docs/lora.md).
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
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel, T5Model

ids = torch.tensor([[3, 4, 5, 1]])
ones, padded = torch.tensor([[1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0]])
tiny = T5Config(vocab_size=9, d_model=8, d_kv=8, d_ff=8, num_layers=2, num_heads=1)
bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)


def moves(base, kind=peft.PrefixTuningConfig, mask=ones, output="last_hidden_state", **inputs):
    """Whether an output moves with the adapter."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, kind(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)).eval()
    try:
        with torch.no_grad():
            before = model(input_ids=ids, attention_mask=mask, **inputs)[output]
            for p in model.prompt_encoder.parameters():
                p.copy_(torch.randn_like(p) * 3)
            after = model(input_ids=ids, attention_mask=mask, **inputs)[output]
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return not torch.equal(before, after)


torch.manual_seed(0)
print("torch", torch.__version__.split("+")[0], "transformers", transformers.__version__, "peft", peft.__version__)
print("BertModel, prefix:", moves(BertModel(bert)))
print("T5EncoderModel, prefix:", moves(T5EncoderModel(tiny)))
print("T5EncoderModel, prefix, a padded text:", moves(T5EncoderModel(tiny), mask=padded))
for output in ("encoder_last_hidden_state", "last_hidden_state"):
    print(f"T5Model, prefix, {output}:", moves(T5Model(tiny), output=output, decoder_input_ids=ids))
print("T5EncoderModel, prompt:", moves(T5EncoderModel(tiny), kind=peft.PromptTuningConfig))
PYTHON
venv/bin/python -W ignore seen.py 2>errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
cat > wanted.txt <<'TEXT'
BertModel, prefix: True
T5EncoderModel, prefix: False
T5EncoderModel, prefix, a padded text: RuntimeError: The size of tensor a (6) must match the size of tensor b (4) at non-singleton dimension 3
T5Model, prefix, encoder_last_hidden_state: False
T5Model, prefix, last_hidden_state: True
T5EncoderModel, prompt: True
TEXT
tail -n 6 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"

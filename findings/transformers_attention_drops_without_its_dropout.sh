#!/usr/bin/env bash
# In transformers 5.24 the attention of BERT and GPT-2 still drops where every nn.Dropout is in eval mode.
#
# To train without dropout, and leave all else in training mode, one sets the nn.Dropout modules to eval, as their pages say
# that an eval-mode dropout is the identity. The attention of BERT, RoBERTa, ELECTRA, DistilBERT and GPT-2 has such a
# module, and does not call it: it reads the module's p, and hands that to the attention's function while the *attention* is
# in training mode. So the forward draws on, and two of them differ. The attention of BLOOM calls its module, and is still.
#
# It matters to whoever compares losses of two forwards (zeroth order, gradient checks, evaluation by hand), counts the draws
# of a generator, or replaces nn.Dropout by something of their own. What helps: eval mode for the modules that hold a dropout
# too, or p = 0.
#
# In zokern: ZOTrainer(dropout=False) sets modules with a dropout in them to eval as well, paired draws look at them, and a
# step whose closure draws though no module shows it warns (tests/integrations/test_transformers_runs.py).
#
# Seen in transformers 5.24.0 with torch 2.13.0 and numpy 2.3.5. Needs python3 with venv.
# Subject: fine-tuning frameworks
# 2026-11-30
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5

cat > drops.py <<'PYTHON'
import torch
import transformers as t

print("transformers", t.__version__, "torch", torch.__version__.partition("+")[0])
wide = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32}
deep = {"vocab_size": 32, "n_layer": 1}
MODELS = {
    "BERT": (t.BertModel, t.BertConfig(**wide)),
    "RoBERTa": (t.RobertaModel, t.RobertaConfig(**wide)),
    "ELECTRA": (t.ElectraModel, t.ElectraConfig(**wide, embedding_size=16)),
    "DistilBERT": (t.DistilBertModel, t.DistilBertConfig(vocab_size=32, dim=16, hidden_dim=32, n_layers=1, n_heads=2)),
    "GPT-2": (t.GPT2Model, t.GPT2Config(**deep, n_embd=16, n_head=2)),
    "BLOOM": (t.BloomModel, t.BloomConfig(**deep, hidden_size=16, n_head=2, hidden_dropout=0.0, attention_dropout=0.1)),
}
ids = torch.arange(4, 20).reshape(2, 8)
for name, (kind, config) in MODELS.items():
    for attention in ("eager",) if name == "BLOOM" else ("sdpa", "eager"):
        torch.manual_seed(0)
        model = kind._from_config(config, attn_implementation=attention).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        first, second = (model(input_ids=ids).last_hidden_state for _ in range(2))
        print(f"{name}, {attention}:", "the same twice" if torch.equal(first, second) else "differs")
PYTHON
found=$(venv/bin/python -W ignore drops.py)
echo "$found"
expected="transformers 5.24.0 torch 2.13.0"
for name in BERT RoBERTa ELECTRA DistilBERT GPT-2; do
  expected+=$'\n'"$name, sdpa: differs"$'\n'"$name, eager: differs"
done
expected+=$'\n'"BLOOM, eager: the same twice"
[[ "$found" == "$expected" ]] || { echo "CHANGED: expected"; echo "$expected"; exit 1; }
echo "SEEN: attention drops though every nn.Dropout is in eval mode"

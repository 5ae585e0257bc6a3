#!/usr/bin/env bash
# Two threads that load models at once leave transformers without tied weights, for the rest of the process.
#
# from_pretrained exchanges PreTrainedModel.tie_weights, an attribute of the class, for a function that does nothing, and
# puts back afterwards what it found before. A second load that begins meanwhile finds the empty function, and where it
# ends last it puts that back. From then on no model ties its weights: output embeddings are a matrix of their own,
# freshly drawn or loaded. Nothing is told, and a later load in one thread does not mend it.
#
# It matters to sweeps and services that load in threads, and to fine-tuning. A head that is tied on paper trains apart
# from the embeddings, and is saved so. What helps: one lock around all loads of a process.
#
# In zokern: all loads of the command, and of zokern.finetune, take one lock.
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
import threading

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel


def tied():
    model = GPT2LMHeadModel(config)
    return model.lm_head.weight is model.transformer.wte.weight


config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1)
GPT2LMHeadModel(config).save_pretrained("model")
both, first_is_done = threading.Barrier(2), threading.Event()


class Slow(GPT2LMHeadModel):
    """Loads overlap: each waits in its constructor for the other, and the second one for the first one's end."""

    def __init__(self, config):
        super().__init__(config)
        both.wait()
        if threading.current_thread().name == "second":
            first_is_done.wait()


def load(name, before):
    before.wait()
    Slow.from_pretrained("model")
    if name == "first":
        first_is_done.set()


go, later = threading.Event(), threading.Event()
plain = transformers.PreTrainedModel.tie_weights
print("torch", torch.__version__.split("+")[0], "transformers", transformers.__version__)
print("before, tied:", tied())
first = threading.Thread(target=load, args=("first", go), name="first")
second = threading.Thread(target=load, args=("second", later), name="second")
first.start()
second.start()
go.set()
while transformers.PreTrainedModel.tie_weights is plain:  # until the first is inside
    pass
later.set()
first.join()
second.join()
print("after, tied:", tied())
transformers.GPT2LMHeadModel.from_pretrained("model")
print("after a load alone, tied:", tied())
PYTHON
timeout 120 venv/bin/python -W ignore seen.py 2>errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
cat > wanted.txt <<'TEXT'
before, tied: True
after, tied: False
after a load alone, tied: False
TEXT
tail -n 3 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"

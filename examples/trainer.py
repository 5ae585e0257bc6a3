"""transformers' Trainer with zeroth-order steps, broken off and resumed: the same bits as the run that was not."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from zokern.integrations.transformers import ZOTrainer

torch.set_num_threads(1)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def sentence(i: int) -> torch.Tensor:
    """Each token is the one before, and one more."""
    return (torch.arange(16) + i) % 61 + 3


data = [{"input_ids": sentence(i), "labels": sentence(i)} for i in range(64)]
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder, max_steps=150, learning_rate=1e-2, per_device_train_batch_size=16, logging_steps=30, save_steps=75,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    settings = {"method": "mezo", "num_samples": 4, "eps": 1e-2}
    whole = model()
    ZOTrainer(whole, args, train_dataset=data, zo=settings).train()
    again = model()
    ZOTrainer(again, args, train_dataset=data, zo=settings).train(resume_from_checkpoint=f"{folder}/checkpoint-75")
assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
print("the resumed run has the bits of the whole one")

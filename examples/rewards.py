"""A language model climbs a reward that a rule computes: what it writes is judged inside the step, by forwards alone."""

import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from zokern.integrations.trl import RewardTrainer

torch.set_num_threads(1)
torch.manual_seed(0)
NUMBERS = 16
vocabulary = {"<pad>": 0, "</s>": 1, **{str(i): 2 + i for i in range(NUMBERS)}}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.3,
    )
)  # fmt: skip
prompts = [{"prompt": f"{i % 7} {i % 5}"} for i in range(24)]


def small(completions: list[str], **columns: object) -> list[float]:
    """How small the numbers are that the model writes, from 0 to 1."""
    return [1 - sum(map(int, text.split())) / (NUMBERS - 1) / max(len(text.split()), 1) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder, max_steps=24, learning_rate=0.04, lr_scheduler_type="constant", per_device_train_batch_size=24,
        logging_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        model, small, args, prompts, prompts[:8], tokenizer,
        zo={"method": "es", "num_directions": 8, "antithetic": True, "eps": 0.2},
        generation={"max_new_tokens": 3, "suppress_tokens": [0, 1]},
    )  # fmt: skip
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
print(f"mean reward {before:.2f} -> {after:.2f}, no gradient of it")
assert after > before + 0.1

"""What a model writes, behind virtual tokens of an adapter too, is what its forward says token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from tests.finetune import test_adapters_tasks, test_answers, test_finetune  # noqa: E402
from tests.finetune.test_adapters_tasks import case, quiet  # noqa: E402
from tests.finetune.test_finetune import tokenizer  # noqa: E402
from zokern.finetune import FinetuneError, Options, finetune, run  # noqa: E402
from zokern.finetune.answering import Answers  # noqa: E402

models_dir, rows, options = test_finetune.models_dir, test_adapters_tasks.rows, test_adapters_tasks.options


@torch.no_grad()
def writes(options: Options) -> tuple[Answers, list[str], list[str]]:
    """A task with random trained weights, what it writes in batches, and what its forward says, token by token."""
    task = run.load(options, quiet).task
    assert isinstance(task, Answers)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p in task.model.parameters():
            if p.requires_grad:
                p.normal_()
    prompts = task.asks["train"]
    assert len({len(prompt) for prompt in prompts}) > 2  # so that some are padded
    found = [task.tokenizer.decode(test_answers.greedy(task, prompt), skip_special_tokens=True) for prompt in prompts]
    return task, task.written(prompts), [text.strip() for text in found]


@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
def test_what_is_written_is_what_the_forward_says(kind: str, options: Options, models_dir: Path) -> None:
    task, said, expected = writes(case(options, kind, "gpt", "answer", {"gpt": models_dir / "gpt"}))
    assert said == expected
    assert len(set(said)) > 3
    assert said[:1] == task.written(task.asks["train"][:1])


def test_a_prefix_stays_in_a_window_of_attention(options: Options, tmp_path: Path) -> None:
    """Its place in the cache is before the padding, which counts in a window."""
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer(True)), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, max_position_embeddings=64, sliding_window=8, initializer_range=0.5, pad_token_id=0,
        bos_token_id=None, eos_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "windowed")
    tokenizer(False).save_pretrained(tmp_path / "windowed")
    _, said, expected = writes(case(options, "prefix", "here", "answer", {"here": tmp_path / "windowed"}))
    assert said == expected
    assert len(set(said)) > 3


def test_a_model_that_writes_nothing_behind_virtual_tokens_is_refused(
    options: Options, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no embeddings here")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "generate", fails)
    with pytest.raises(
        FinetuneError, match=r"prompt does not serve --answer .*no embeddings here.*take --adapter lora"
    ):
        finetune(case(options, "prompt", "gpt", "answer", {"gpt": models_dir / "gpt"}))
    assert not options.output.exists()

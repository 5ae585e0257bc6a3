"""`zokern finetune` on a device waits for it at log lines only: its batches, and each objective's forward, on PyTorch's
device "meta", whose tensors have no values, and with transformers' SDPA, whose masks would be looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.test_no_waiting import DEVICE, Transfers

transformers = pytest.importorskip("transformers")
if int(transformers.__version__.partition(".")[0]) < 5:
    pytest.skip("before transformers 5 each model has an attention of its own", allow_module_level=True)

from tests.bench.test_bench_step import Reads  # noqa: E402
from zokern.bench import models  # noqa: E402
from zokern.finetune.answering import Answers  # noqa: E402
from zokern.finetune.attention import NAME, attend_without_waiting  # noqa: E402
from zokern.finetune.batches import Rows, cut  # noqa: E402
from zokern.finetune.candidates import Choices  # noqa: E402
from zokern.finetune.examples import Example  # noqa: E402
from zokern.finetune.models import place  # noqa: E402
from zokern.finetune.prompts import Prompt  # noqa: E402
from zokern.finetune.scored import Kept, Scored  # noqa: E402
from zokern.finetune.similar import Similarity  # noqa: E402
from zokern.finetune.tasks import Classifier, Task  # noqa: E402

TINY = pytest.mark.parametrize("name", ["tiny-opt", "tiny-qwen", "tiny-encoder"])
PADDED = [[3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13]]
WHOLE = [[3, 4, 5, 6]] * 4


def model_of(name: str) -> Any:
    model = models.build(name, torch.float32, torch.device("cpu"))
    model.set_attn_implementation("sdpa")
    return model.eval()


def task_of(objective: str, device: torch.device) -> Task:
    """With rows of its own in place of a tokenizer's."""
    kind = {"prompt": Prompt, "words": Prompt, "similarity": Similarity, "classifier": Classifier, "choices": Choices,
            "answer": Answers}[objective]  # fmt: skip
    task = kind.__new__(kind)
    if objective == "classifier":
        small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
        task.model = transformers.BertForSequenceClassification(transformers.BertConfig(**small)).eval()
    else:
        task.model = model_of("tiny-encoder" if objective == "similarity" else "tiny-opt")
    task.model.requires_grad_(False)
    task.model.to(device)
    assert attend_without_waiting(task.model)
    task.device, task.labels = device, ["a", "b"]
    if isinstance(task, Prompt):
        task.words = [[5], [6]] if objective == "prompt" else [[5, 6], [7]]
        task.single, task._keeps = objective == "prompt", True
        task._counts = torch.tensor([len(word) for word in task.words]).to(device)
        task._first = torch.tensor([word[0] for word in task.words]).to(device)
    if isinstance(task, Scored):
        ones = objective == "answer"
        texts = [Example(("x",), answers=("y",))] * 4 if ones else [Example(("x",), ("y", "z"), (i,)) for i in (0, 1)]
        counts, begins = [2, 1, 1, 1], list(range(0, 5, 1 if ones else 2))
        task.kept = {"train": Kept(texts, begins, counts, torch.tensor(counts).to(device), 2)}
        task.frame, task.keeps = SimpleNamespace(encoder=False), True
    if isinstance(task, Similarity):
        task.temperature = 0.1
    lengths = [len(row) for row in PADDED]
    rows = Rows.pack(PADDED, 0, torch.device("cpu"))
    task.sets = {
        "train": (
            Rows(rows.ids.to(device), lengths),
            [0, 1] if objective in ("words", "similarity", "choices") else [0, 1, 0, 1],
        )
    }
    return task


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: t)  # what the copies are made from


@pytest.mark.parametrize("objective", ["classifier", "similarity", "prompt", "words", "choices", "answer"])
def test_a_batch_and_its_loss_ask_the_device_for_nothing(objective: str, pinned: None) -> None:
    task = task_of(objective, DEVICE)
    with Transfers() as transfers:
        batch = task.batch("train", [1, 0])
        loss = task.loss(batch)
    assert loss.device == DEVICE
    assert transfers.waited == []
    assert transfers.seen == [("cpu", "meta")] * (2 if objective == "choices" else 1)  # all that a batch is, at once


@TINY
@pytest.mark.parametrize("rows", [PADDED, WHOLE], ids=["padded", "whole"])
def test_no_mask_is_read_and_the_outputs_stay(name: str, rows: list[list[int]]) -> None:
    model = model_of(name)
    group = cut(Rows.pack(rows, 0, torch.device("cpu")), [0, 1, 2], [0, 1, 0]).groups[0]
    outputs, read = [], []
    for _ in range(2):
        with torch.no_grad(), Reads() as reads:
            outputs.append(model(input_ids=group.ids, attention_mask=group.mask)[0])
        read.append(reads.seen)
        if model.config._attn_implementation != NAME:
            assert attend_without_waiting(model)
    assert read[0]  # transformers' own looks
    assert read[1] == []
    inside = group.mask.bool()
    torch.testing.assert_close(outputs[1][inside], outputs[0][inside])
    assert "zokern" not in model.config.to_json_string()  # which is saved with the tuned model


@pytest.mark.parametrize(("device", "attention"), [("meta", NAME), ("cpu", "sdpa")])
def test_a_model_on_a_device_has_it_and_one_on_the_host_does_not_need_it(device: str, attention: str) -> None:
    model = model_of("tiny-opt")
    place(model, torch.device(device))
    assert {p.device.type for p in model.parameters()} == {device}
    assert model.config._attn_implementation == attention


def test_what_has_another_attention_keeps_it() -> None:
    model = model_of("tiny-opt")
    model.set_attn_implementation("eager")
    assert not attend_without_waiting(model)
    assert model.config._attn_implementation == "eager"

    class Old(nn.Module):
        config = SimpleNamespace(_attn_implementation="sdpa")

    assert not attend_without_waiting(Old())

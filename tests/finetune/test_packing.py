"""Packed rows: the losses of padded ones, from the tokens that count alone; and models to which that is not the same."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tests.finetune.test_choices import examples as rows_with_candidates  # noqa: E402
from tests.finetune.test_choices import t5_dir, task_of  # noqa: E402, F401
from tests.finetune.test_finetune import TEXTS, command, models_dir, options, table, tensors, tokenizer  # noqa: E402, F401
from tests.finetune.test_resuming import alike, broken, no_pictures, resume  # noqa: E402, F401
from zokern import journal  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune, packing  # noqa: E402
from zokern.finetune.answering import Answers  # noqa: E402
from zokern.finetune.batches import Rows  # noqa: E402
from zokern.finetune.candidates import Choices  # noqa: E402
from zokern.finetune.examples import Example  # noqa: E402
from zokern.finetune.framing import Frame  # noqa: E402
from zokern.finetune.packed_attention import NAME, Unpackable  # noqa: E402
from zokern.finetune.packer import proven  # noqa: E402
from zokern.finetune.packing import Wanted, pack  # noqa: E402
from zokern.finetune.prompts import Prompt  # noqa: E402
from zokern.finetune.similar import Similarity  # noqa: E402
from zokern.finetune.tasks import choose_packing, evaluate  # noqa: E402

SIZE = len(tokenizer(True))
LARGE = {"initializer_range": 0.3}
SMALL = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **LARGE}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
READER = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 64}
GPT2 = {
    "vocab_size": SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 3,
    "eos_token_id": 3,
}
OPT = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
       "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.3}  # fmt: skip
MADE: dict[str, Callable[[Any], nn.Module]] = {
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, **LARGE)),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "opt": lambda t: t.OPTForCausalLM(t.OPTConfig(**OPT)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "bert": lambda t: t.BertModel(t.BertConfig(**READER)),
    "roberta": lambda t: t.RobertaModel(t.RobertaConfig(**READER, pad_token_id=0)),
    "window": lambda t: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=4)),
    "bloom": lambda t: t.BloomForCausalLM(t.BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=4)),
}  # fmt: skip
DECODERS = ("gpt2", "llama", "opt", "qwen2")


def model_of(kind: str) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MADE[kind](transformers).eval()
        for p in model.parameters():  # biases too, so that nothing is the same by being 0
            p.add_(torch.randn_like(p), alpha=0.02)
    return model.requires_grad_(False)


def prompt(model: Any, words: list[str]) -> Prompt:
    tok = tokenizer(False)
    tok.pad_token = "[PAD]"
    task = Prompt(model, tok, ["animal", "fruit"], 32, "{text} Topic:", words)
    task.add("eval", TEXTS)
    return task


def choices(model: Any) -> Choices:
    tok = tokenizer(False)
    tok.pad_token = "[PAD]"
    task, texts = Choices(model, tok, Frame(tok, "{text} is", 32), 64, []), rows_with_candidates()
    task.add("eval", data.TextSet([*texts], [text.right[0] for text in texts]))
    return task


def answers(model: Any) -> Answers:
    tok = tokenizer(False)
    tok.pad_token = "[PAD]"
    task = Answers(model, tok, Frame(tok, "{text} is", 32), 64, 6)
    texts = [Example((str(text),), answers=("fig pear plum"[: 4 + i % 7],)) for i, text in enumerate(TEXTS.texts)]
    task.add("eval", data.TextSet([*texts], [0] * len(texts)))
    return task


def similarity(model: Any) -> Similarity:
    task = Similarity(model, tokenizer(True), ["animal", "fruit"], 32, ["a big animal", "fruit"], temperature=0.5)
    task.add("eval", TEXTS)
    return task


CASES = {
    "one token": lambda model: prompt(model, ["cat", "fig"]),
    "words": lambda model: prompt(model, ["big cat", "fig"]),
    "choices": choices,
    "answer": answers,
}


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Tokens that the embedding reads, and rows that the head makes logits of."""
    found = {"read": 0, "head": 0}
    head, texts = model.get_output_embeddings(), model.get_input_embeddings()

    def count(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            found[name] += given[0].shape[0] * given[0].shape[1]

        return add

    hooks = [texts.register_forward_pre_hook(count("read"))]
    if head is not None:
        hooks.append(head.register_forward_pre_hook(count("head")))
    yield found
    for hook in hooks:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("kind", DECODERS)
def test_losses_are_those_of_padded_rows_with_all_logits(kind: str, case: str) -> None:
    model, wanted = model_of(kind), [7, 3, 0, *range(9, 18)]
    task = CASES[case](model)
    padded, before = task.batch("eval", wanted), evaluate(task, "eval", 7)
    expected = task.loss(padded)
    with counted(model) as old:
        task.loss(padded)
    assert choose_packing(task, "auto") is None
    assert task.packer is not None
    batch = task.batch("eval", wanted)
    with counted(model) as new:
        loss = task.loss(batch)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    assert torch.equal(task.loss(batch), loss)  # the same every time
    after = evaluate(task, "eval", 7)
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1], rel=1e-5)
    rows, _ = task.sets["eval"]
    assert new["read"] < old["read"]
    assert new["head"] < old["head"]
    if case == "one token":
        assert new == {"read": sum(rows.lengths[i] for i in wanted), "head": len(wanted)}
    assert "zokern" not in model.config.to_json_string()  # which is saved with the tuned model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_similarity_reads_label_sentences_once_for_all_batches(kind: str) -> None:
    task = similarity(model_of(kind))
    draws = [[7, 3, 0, 9], [5, 11, 30], [2]]
    expected = [task.loss(batch) for batch in task.batches("eval", draws)]
    before = evaluate(task, "eval", 7)
    assert choose_packing(task, "auto") is None
    batches = list(task.batches("eval", draws))
    for _ in range(2):  # both probes of a step
        with counted(task.model) as new:
            found = [task.loss(batch) for batch in batches]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        rows, targets = task.sets["eval"]
        texts = sum(rows.lengths[i] for draw in draws for i in draw)
        assert new["read"] == texts + sum(rows.lengths[len(targets) :])
    for p in task.model.parameters():
        p.mul_(1.01)  # another probe: the sentences are not those of the last one
    moved = [task.loss(batch) for batch in batches]
    alone = [task.loss(task.batch("eval", draw)) for draw in draws]
    torch.testing.assert_close(moved, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="batch 1 of several is evaluated where batch 3 was to come"):
        task.loss(batches[1])
    for p in task.model.parameters():
        p.div_(1.01)
    assert evaluate(task, "eval", 7) == pytest.approx(before, rel=1e-4)


@torch.no_grad()
def test_an_encoder_reads_a_text_once_for_all_its_candidates(t5_dir: Path) -> None:
    task, texts = task_of(".", t5_dir, encoder=True), rows_with_candidates()
    task.add("eval", data.TextSet([*texts], [text.right[0] for text in texts]))
    wanted = [7, 3, 0, *range(10, 20)]
    expected, before = task.loss(task.batch("eval", wanted)), evaluate(task, "eval", 7)
    assert choose_packing(task, "auto") is None
    assert task.packer is None
    seen: list[int] = []
    hook = task.model.get_encoder().register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    torch.testing.assert_close(task.loss(task.batch("eval", wanted)), expected, rtol=1e-5, atol=1e-6)
    hook.remove()
    assert sum(seen) == len(wanted)
    assert evaluate(task, "eval", 7) == pytest.approx(before, rel=1e-5)


@torch.no_grad()
def test_groups_and_pieces_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = choices(model_of("llama"))
    task.pack()
    expected = task.loss(task.batch("eval", range(20)))
    for tokens, padded in ((1, 8192), (40, 8192), (1024, 1), (1024, 60), (100, 40)):
        monkeypatch.setattr(packing, "TOKENS", tokens)
        monkeypatch.setattr(packing, "_PADDED", padded)
        batch = task.batch("eval", range(20))
        assert len(batch.groups) == {1: 20}.get(tokens, len(batch.groups))
        torch.testing.assert_close(task.loss(batch), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "why"), [("window", "it reads rows otherwise when they are packed"), ("bloom", "takes no positions")]
)
def test_a_model_to_which_packed_rows_are_others_keeps_its_way(kind: str, why: str) -> None:
    model = model_of(kind)
    task = prompt(model, ["cat", "fig"])
    before, name = task.loss(task.batch("eval", range(9))), model.config._attn_implementation
    said = choose_packing(task, "auto")
    assert said is not None
    assert why in said
    assert task.packer is None
    assert model.config._attn_implementation == name
    assert torch.equal(task.loss(task.batch("eval", range(9))), before)
    with pytest.raises(FinetuneError, match=f"--packing always is not possible: .*{why}"):
        choose_packing(task, "always")


class Leaking(nn.Module):
    """Each token sees the one before it in memory, too faintly for a comparison of values."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 1e-6 * hidden.roll(1, dims=1)


@torch.no_grad()
def test_the_faintest_sight_of_another_row_is_found() -> None:
    model = model_of("llama")
    model.model.layers[0].input_layernorm = nn.Sequential(Leaking(), model.model.layers[0].input_layernorm)
    rows = Rows.pack([[5, 6, 7], [8, 9, 10, 11], [6, 5, 9, 8, 12]], 0, torch.device("cpu"))
    with pytest.raises(Unpackable, match="it reads rows otherwise"):
        proven(model, [rows], scores=True)
    assert not model.config._attn_implementation.startswith(NAME)


def test_tokens_of_shared_prompts_are_there_once() -> None:
    rows = Rows.pack([[1, 2, 3, 7, 8], [1, 2, 3, 9], [4, 5]], 0, torch.device("cpu"))
    (group,) = pack(rows, [Wanted([0, 1], 3, [2, 1]), Wanted([2], 0, [0])], [0, 0]).groups
    assert isinstance(group, packing.Packed)
    assert group.ids.tolist() == [[4, 5, 1, 2, 3, 7]]  # the shortest text first; 8 and 9 are scored, never read
    assert group.positions.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert group.reads.tolist() == [1, 4, 5]
    assert group.counts.tolist() == [1, 2, 1]
    assert [group.reads[ends[: int(n)]].tolist() for ends, n in zip(group.ends, group.counts, strict=True)] == [
        [1], [4, 5], [4]
    ]  # fmt: skip
    assert [said[: int(n)].tolist() for said, n in zip(group.said, group.counts, strict=True)][1:] == [[7, 8], [9]]


@torch.no_grad()
def test_what_a_model_writes_stays() -> None:
    task = answers(model_of("llama"))
    before = task.written(task.asks["eval"][:6])
    task.pack()
    assert task.written(task.asks["eval"][:6]) == before


def test_heads_are_never_packed(options: Options) -> None:
    with pytest.raises(FinetuneError, match="--packing always is not possible: a head reads whole texts"):
        finetune(dataclasses.replace(options, packing="always"))


@pytest.mark.parametrize("objective", ["prompt", "similarity"])
def test_a_packed_run_goes_on_and_replays(
    objective: str, options: Options, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(models_dir / ("gpt" if objective == "prompt" else "bert"))
    options = dataclasses.replace(options, model=name, objective=objective, accumulate=2, batch_size=4)
    assert finetune(options).packed
    assert json.loads((options.output / "run.json").read_text())["chosen"]["packed"] is True
    half = dataclasses.replace(options, output=tmp_path / "half")
    broken(half, 5, monkeypatch)
    resume(half)
    alike(half.output, options.output)
    model = transformers.AutoModelForCausalLM if objective == "prompt" else transformers.AutoModel
    again = model.from_pretrained(name)
    journal.replay(options.output / "journal.zkj", again)
    saved = tensors(options.output / "checkpoint")
    assert all(torch.equal(p, saved[n]) for n, p in again.named_parameters())


def test_a_run_of_an_older_version_goes_on_padded_as_it_was(
    options: Options, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(options, model=str(models_dir / "gpt"), objective="prompt", packing="never")
    assert not finetune(options).packed
    half = dataclasses.replace(options, output=tmp_path / "half")
    broken(half, 5, monkeypatch)
    path = half.output / "options.json"
    stored = json.loads(path.read_text())
    del stored["packing"]
    path.write_text(json.dumps(stored))
    resume(half)
    alike(half.output, options.output)

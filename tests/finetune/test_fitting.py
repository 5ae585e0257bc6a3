"""Prompts that fit: whatever the script and the tokenizer, the text gives way, and nothing else does."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

from tests.finetune import test_finetune  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune  # noqa: E402
from zokern.finetune.fitting import fit  # noqa: E402
from zokern.finetune.prompts import Prompt  # noqa: E402
from zokern.finetune.similar import Similarity  # noqa: E402
from zokern.finetune.tasks import Classifier, cut_notes  # noqa: E402

TAIL = " It was"


@cache
def byte_level(trim: bool = True) -> Any:
    """GPT-2's kind: a character may be several tokens. No merges but those of ' It was' and ' good'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = []
    for word in ("ĠIt", "Ġwas", "Ġgood", "Ġbad"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocab.setdefault(word[:end], len(vocab))
    vocab["<end>"] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if trim:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


@cache
def normalising() -> Any:
    """SentencePiece's kind: a word's mark, and characters that normalise to others, or to none."""
    letters = ((c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz")
    vocab = [("<unk>", 0.0), ("▁", -1.0), ("▁It", -1.0), ("▁was", -1.0), *letters]
    core = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.StripAccents()])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<unk>")


class Slow:
    """A tokenizer without offsets, a token for each byte."""

    is_fast = False

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("utf-8", "surrogatepass"))}


TOKENIZERS = {
    "byte level": byte_level,
    "untrimmed": lambda: byte_level(False),
    "normalising": normalising,
    "slow": Slow,
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    "\U0001f600\U0001f468\u200d ኢትዮጵያ ሰላم\ufdfa日本e\u0301 \n", max_size=60
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, limit=st.integers(0, 60))
@example(text="\U0001f600" * 3, limit=5)
@example(text="ኢትዮጵያ ሰላም " * 40, limit=42)
def test_a_text_is_cut_by_characters(name: str, text: str, limit: int) -> None:
    """It ends; the result fits, where anything does; it is the text's beginning; little more would not fit."""
    tokenizer = TOKENIZERS[name]()

    def count(part: str) -> int:
        return len(tokenizer(part + TAIL)["input_ids"])

    cut = fit(text, tokenizer, count, limit)
    assert text.startswith(cut)
    assert cut in (text, cut.rstrip())  # no space before the template's own
    assert count(cut) <= limit or (cut == "" and count("") > limit)
    if count(text) <= limit:
        assert cut == text
    elif name in ("byte level", "untrimmed"):
        longer = text[: len(cut) + 2 + len(text[len(cut) :]) - len(text[len(cut) :].lstrip())]
        assert count(longer) > limit


def prompt_of(
    tokenizer: Any, words: list[str], max_length: int, template: str = "{text}" + TAIL, **more: Any
) -> Prompt:
    model = nn.Embedding(1024, 2)
    model.get_input_embeddings = lambda: model  # type: ignore[assignment]
    return Prompt(model, tokenizer, [str(i) for i in range(len(words))], max_length, template, words, **more)


@pytest.mark.parametrize("max_length", range(2, 60))
def test_the_reported_hangs(max_length: int) -> None:
    prompt = prompt_of(byte_level(), ["good", "bad"], max_length)
    for text in ("\U0001f600" * 40, "ኢትዮጵያ ሰላም " * 40):
        [ids], _ = prompt.frame.prompts([text])
        assert max_length - 4 < len(ids) <= max_length or max_length < 5
        assert byte_level().decode(ids).endswith(TAIL)
        assert "\ufffd" not in byte_level().decode(ids)


def test_the_end_of_the_template_stays_and_the_cuts_are_counted() -> None:
    prompt = prompt_of(byte_level(), ["good", "bad"], 30, "Say: {text}? Then answer:")
    with pytest.raises(FinetuneError, match="--template alone has 27 tokens"):
        prompt_of(byte_level(), ["good", "bad"], 19, "Say: {text}? Then it must answer:")._tokens(["x" * 9])
    tokens, cut = prompt._tokens(["a", "a film " * 9, "b" * 50])
    assert (cut.count, cut.total, cut.longest) == (2, 3, 19 + 9 * 7)
    for ids in tokens:
        assert byte_level().decode(ids).endswith("? Then answer:")
        assert len(ids) <= 30


@pytest.mark.parametrize("template", ['{"a": {text}, "b": {}, "c": [{}]', "{ text } {text} {1} {a b} }{", "{text}{"])
def test_braces_that_are_no_placeholder_stay(template: str) -> None:
    """What the message about placeholders says: only a name in braces is one."""
    Options(template=template).check_each()
    prompt = prompt_of(byte_level(), ["好", "坏"], 90, template, space=False)
    assert byte_level().decode(prompt.frame.prompts(["so {text} {nope}"])[0][0]) == template.replace(
        "{text}", "so {text} {nope}"
    )


# ---------------------------------------------------------------------------------------------------------- label words


@pytest.mark.parametrize("template", ["{text} It was", "{text} It was ", "{text} It was  "])
@pytest.mark.parametrize("words", [["good", "bad"], [" good", " bad"], ["  good ", "bad"]])
def test_one_space_in_all_between_template_and_word(template: str, words: list[str]) -> None:
    prompt = prompt_of(byte_level(), words, 30, template)
    assert prompt.single
    tokens = [byte_level().convert_ids_to_tokens(word) for word in prompt.words]
    assert tokens == [["Ġgood"], ["Ġbad"]]
    assert byte_level().decode(prompt.frame.prompts(["so"])[0][0] + prompt.words[0]) == "so It was good"


def test_the_space_may_be_left_out() -> None:
    prompt = prompt_of(byte_level(), ["好", "坏"], 40, "{text}这部电影", space=False)
    assert byte_level().decode(prompt.frame.prompts(["看"])[0][0] + prompt.words[0]) == "看这部电影好"
    prompt = prompt_of(byte_level(), ["good", "bad"], 40, "{text}\nAnswer:\n", space=False)
    assert byte_level().decode(prompt.frame.prompts(["so"])[0][0] + prompt.words[1]) == "so\nAnswer:\nbad"
    with pytest.raises(FinetuneError, match=r"'good' does not begin a token of its own.*--no-space"):
        prompt_of(byte_level(), ["good", "bad"], 40, "{text} It was ", space=False)


def model_of(path: Path, tokenizer: Any, positions: int) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=positions
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def options_of(tmp_path: Path, **more: Any) -> Options:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = [(f"{'long ' * (30 if i % 4 == 0 else 1)}{i}", "ab"[i % 2]) for i in range(20)]
        csv.writer(file).writerows([("text", "label"), *rows])
    (tmp_path / "words.json").write_text(json.dumps({"a": "xyz", "b": "good"}))
    options = Options(
        data=str(tmp_path / "t.csv"), output=tmp_path / "out", steps=1, eval_every=0, batch_size=4, device="cpu", threads=1,
        template="{text} It was", verbalizers=tmp_path / "words.json", force=True,
    )  # fmt: skip
    return dataclasses.replace(options, **more)


def test_words_of_several_tokens_have_room(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """' xyz' is four tokens here. What the message allows works, at the model's limit; one more is refused."""
    model = model_of(tmp_path / "gpt", byte_level(), 48)
    with pytest.raises(FinetuneError, match=r"--max-length is 48; allowed: at most 44, .* 48 .* word has 4"):
        finetune(options_of(tmp_path, model=model, max_length=48))
    with pytest.raises(FinetuneError, match="--max-length is 45"):
        finetune(options_of(tmp_path, model=model, max_length=45))
    finetune(options_of(tmp_path, model=model, max_length=44))
    said = capsys.readouterr().out
    assert "texts (25.0 %) are cut to 44 tokens; the longest has 154 tokens, the model takes 44" in said
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert any("are cut to 44 tokens" in note for note in run["data"]["notes"])
    options = options_of(tmp_path, model=model, max_length=48)
    (tmp_path / "words.json").write_text(json.dumps({"a": "bad", "b": "good"}))  # a token each, which is never read
    finetune(options)


@pytest.mark.parametrize("other", ["a", "by"], ids=["single tokens", "several"])
def test_a_word_that_the_model_has_no_embedding_for_is_refused(other: str) -> None:
    """A word of one token is never read, only looked up in the scores: the check of what is read does not see it."""
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.add_tokens([" zebra"])
    model = nn.Embedding(len(tokenizer) - 1, 2)
    model.get_input_embeddings = lambda: model  # type: ignore[assignment]
    with pytest.raises(FinetuneError, match=r"word of the label 'x' \(--verbalizers\) has 1 tokens .*' zebra'"):
        Prompt(model, tokenizer, ["x", "y"], 20, "{text}" + TAIL, ["zebra", other])
    model = nn.Embedding(len(tokenizer), 2)
    model.get_input_embeddings = lambda: model  # type: ignore[assignment]
    prompt = Prompt(model, tokenizer, ["x", "y"], 20, "{text}" + TAIL, ["zebra", other])
    assert prompt.words[0] == [len(tokenizer) - 1]


def test_the_length_that_a_note_names_cuts_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = model_of(tmp_path / "gpt", byte_level(), 200)
    finetune(options_of(tmp_path, model=model, max_length=40))
    assert "--max-length 154 cuts none" in capsys.readouterr().out
    finetune(options_of(tmp_path, model=model, max_length=154))
    assert "cut" not in capsys.readouterr().out


def test_sentences_about_labels_are_never_cut(models_dir: Path) -> None:
    model, tok = test_finetune.load("bert", models_dir, "similarity", ["animal", "fruit"])
    with pytest.raises(FinetuneError, match=r"1 of the labels' sentences .* --max-length 8, the longest 22"):
        Similarity(model, tok, ["animal", "fruit"], 8, ["a big " * 10, "fruit"], temperature=0.5)
    task = Similarity(model, tok, ["animal", "fruit"], 8, ["a big animal", "fruit"], temperature=0.5)
    task.add("eval", data.TextSet(["cat " * 20, "fig"], [0, 1]))
    assert (task.cuts["eval"].count, task.cuts["eval"].longest) == (1, 22)
    assert task.sets["eval"][0].lengths == [8, 3, 5, 3]


def test_texts_without_a_token_are_left_out_and_told(models_dir: Path) -> None:
    model, _ = test_finetune.load("classifier", models_dir, "classifier", ["animal", "fruit"])
    tok = test_finetune.tokenizer(False)
    tok.pad_token = "[PAD]"
    tok.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    task = Classifier(model, tok, ["animal", "fruit"], 8)
    task.add("eval", data.TextSet(["cat", "\u200b", "fig"], [0, 0, 1]))
    assert task.sets["eval"][1] == [0, 1]
    assert task.sets["eval"][0].lengths == [1, 1]
    assert cut_notes(task, 64) == ["eval: 1 texts left out, as the tokenizer makes nothing of them"]
    with pytest.raises(FinetuneError, match="no text has a token"):
        task.add("train", data.TextSet(["\u200b"], [0]))


models_dir = test_finetune.models_dir

"""Models as they are published: how long their texts may be, what their tokenizers may say, and which files load."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.finetune.test_finetune import command, sentences, table, tensors, tokenizer  # noqa: E402, F401
from zokern.finetune import FinetuneError, Options, choosing, finetune  # noqa: E402
from zokern.finetune.checkpoints import longest  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def options(table: Path, tmp_path: Path) -> Options:  # noqa: F811
    return Options(
        model=str(tmp_path / "model"), data=str(table), output=tmp_path / "out", steps=2, batch_size=8, eval_every=0,
        max_length=16, limit_eval=8, device="cpu", threads=1,
    )  # fmt: skip


def built(make: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def save(model: Any, path: Path, bert: bool = True) -> None:
    model.save_pretrained(path)
    tokenizer(bert).save_pretrained(path)


# --------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    "name",
    ["Roberta", "MPNet", "Data2VecText", "RobertaPreLayerNorm", "Camembert", "XLMRobertaXL", "Longformer", "IBert",
     "MarkupLM", "Bert", "Electra", "OPT", "GPT2", "DistilBert"],
)  # fmt: skip
def test_the_longest_text_is_what_the_model_can_take(name: str) -> None:
    """By trying: at the limit it runs, one more does not; no list of names says which model starts its positions where."""
    config = getattr(transformers, f"{name}Config")(vocab_size=40, max_position_embeddings=34, **SMALL)
    model = built(lambda: transformers.AutoModel.from_config(config))
    limit = longest(model, SimpleNamespace(model_max_length=10**30))

    def run(length: int) -> None:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long))

    run(limit)
    if name != "Longformer":  # which pads to its window
        with pytest.raises((IndexError, RuntimeError)):
            run(limit + 1)
    assert longest(model, SimpleNamespace(model_max_length=20)) == 20


def test_the_limit_is_told_before_a_forward(options: Options) -> None:
    config = transformers.MPNetConfig(vocab_size=len(tokenizer(True)), max_position_embeddings=34, **SMALL)
    save(built(lambda: transformers.MPNetForSequenceClassification(config)), Path(options.model))
    with pytest.raises(FinetuneError, match="--max-length is 33; allowed: at most 32"):
        finetune(dataclasses.replace(options, max_length=33))
    finetune(dataclasses.replace(options, max_length=32))


# ---------------------------------------------------------------------------------------------------- tokens, embeddings


def bert(rows: int) -> Any:
    config = transformers.BertConfig(vocab_size=rows, max_position_embeddings=64, **SMALL)
    return built(lambda: transformers.BertForSequenceClassification(config))


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_the_remedy_works(options: Options) -> None:
    model, tok = bert(len(tokenizer(True))), tokenizer(True)
    tok.add_tokens(["new"])
    model.save_pretrained(options.model)
    tok.save_pretrained(options.model)
    finetune(options)  # no text has it
    data = Path(options.output.parent / "t.csv")
    data.write_text("text,label\n" + "".join(f"{'new' if i == 3 else 'cat'} {i},{'ab'[i % 2]}\n" for i in range(20)))
    options = dataclasses.replace(options, data=str(data), force=True)
    with pytest.raises(FinetuneError, match=r"a text has 1 tokens .* no embedding: \['new'\].*resize_token_embeddings"):
        finetune(options)
    model.resize_token_embeddings(len(tok))
    model.save_pretrained(options.model)
    finetune(options)


def test_a_padding_token_without_an_embedding_is_refused(options: Options) -> None:
    model, tok = bert(len(tokenizer(True))), tokenizer(True)
    tok.add_special_tokens({"pad_token": "<pad>"})
    model.save_pretrained(options.model)
    tok.save_pretrained(options.model)
    with pytest.raises(FinetuneError, match=r"the tokenizer of --model .* has 1 tokens .*\['<pad>'\]"):
        finetune(options)


# ------------------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize(
    ("architecture", "two_parts", "expected"),
    [
        ("Gemma3ForConditionalGeneration", False, "prompt"),
        ("Qwen2VLForConditionalGeneration", False, "prompt"),
        ("T5EncoderModel", True, "similarity"),
        ("UMT5EncoderModel", False, "similarity"),
        ("T5ForConditionalGeneration", True, "prompt"),
        ("T5ForSequenceClassification", True, "classifier"),
        ("T5Model", True, "prompt"),
    ],
)
def test_auto_for_models_beyond_encoders_and_decoders(architecture: str, two_parts: bool, expected: str) -> None:
    config = SimpleNamespace(architectures=[architecture], model_type="t5", is_encoder_decoder=two_parts)
    assert choosing.objective(config)[0] == expected


def gemma(rows: int) -> Any:
    text = {"vocab_size": rows, "head_dim": 8, "num_key_value_heads": 1, "max_position_embeddings": 64, **SMALL}
    vision = {"image_size": 28, "patch_size": 14, **SMALL}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return built(lambda: transformers.Gemma3ForConditionalGeneration(config))


def qwen(rows: int) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {
        "vocab_size": rows,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rope_parameters": rope,
        **SMALL,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return built(lambda: transformers.Qwen2VLForConditionalGeneration(config))


@pytest.mark.parametrize(("make", "tower"), [(gemma, "vision_tower"), (qwen, "visual")])
def test_models_with_pictures_are_tuned_where_texts_reach(make: Any, tower: str, options: Options) -> None:
    model = make(len(tokenizer(False)))
    save(model, Path(options.model), bert=False)
    summary = finetune(options)
    assert summary.objective == "prompt"
    before, after = tensors(Path(options.model)), tensors(summary.output.checkpoint)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(tower in name for name in changed)
    assert sum(tower in name for name in before) > 3


def t5(kind: str) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer(True)), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=3,
    )  # fmt: skip
    return built(lambda: getattr(transformers, kind)(config))


def test_sentence_t5_loads_its_encoder(options: Options) -> None:
    save(t5("T5EncoderModel"), Path(options.model))
    summary = finetune(options)
    assert summary.objective == "similarity"
    assert json.loads((summary.output.checkpoint / "config.json").read_text())["architectures"] == ["T5EncoderModel"]
    code, said = command("replay", options.model, summary.output.journal, "-o", options.output / "again")
    assert code == 0, said


def test_a_whole_t5_gives_its_encoder_where_asked(options: Options) -> None:
    save(t5("T5ForConditionalGeneration"), Path(options.model))
    assert finetune(options).objective == "prompt"
    assert finetune(dataclasses.replace(options, objective="classifier", force=True)).objective == "classifier"
    assert finetune(dataclasses.replace(options, objective="similarity", force=True)).objective == "similarity"
    config = transformers.BartConfig(vocab_size=len(tokenizer(True)), d_model=16, encoder_layers=1, decoder_layers=1,
                                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                                     decoder_ffn_dim=16, max_position_embeddings=64)  # fmt: skip
    save(built(lambda: transformers.BartModel(config)), Path(options.model))
    with pytest.raises(FinetuneError, match="no class for the encoder alone"):
        finetune(dataclasses.replace(options, objective="similarity", force=True))


# ------------------------------------------------------------------------------------------------------- what is refused


def test_code_in_a_checkpoint_is_never_run_nor_asked_about(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ran = Path(options.model), options.output.parent / "ran"
    path.mkdir()
    config = {"model_type": "mine", "architectures": ["Mine"],
              "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(FinetuneError, match="brings Python code of its own, which the command does not run"):
        finetune(options)
    assert not ran.exists()


class _Runs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_pickled_tensors_load_and_pickled_code_does_not(options: Options) -> None:
    model, path, ran = bert(len(tokenizer(True))), Path(options.model), options.output.parent / "ran"
    save(model, path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    finetune(options)
    torch.save({**model.state_dict(), "more": _Runs(str(ran))}, path / "pytorch_model.bin")
    with pytest.raises(FinetuneError, match=r"pickle file with more in it than tensors.*safetensors"):
        finetune(dataclasses.replace(options, force=True))
    assert not ran.exists()


def test_an_adapter_without_a_base_is_refused(options: Options) -> None:
    Path(options.model).mkdir()
    (Path(options.model) / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FinetuneError,
        match=r"is a PEFT adapter, and its adapter_config.json.*it names no base model.*as base_model_name_or_path",
    ):
        finetune(options)


# ------------------------------------------------------------------------------------------------------------------ GGUF


def write_gguf(path: Path) -> None:
    """A LLaMA of one block, of which two matrices are quantised."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁animal", "▁fruit", "▁the", "▁is"]
    types = [2, 3, 3, *[6] * 256, *[1] * 5]
    file = gguf.GGUFWriter(path, "llama")
    for name, value in {"context_length": 128, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
                        "head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 16,
                        "vocab_size": len(words)}.items():  # fmt: skip
        getattr(file, f"add_{name}")(value)
    file.add_tokenizer_model("llama")
    file.add_token_list([word.encode() for word in words])
    file.add_token_scores([-float(i) for i in range(len(words))])
    file.add_token_types(types)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(words), 32), "output": (len(words), 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,), **{f"blk.0.attn_{n}": (32, 32) for n in ("q", "k", "v", "output")},
              **{f"blk.0.ffn_{n}": (32, 32) for n in ("gate", "up", "down")}}  # fmt: skip
    for name, shape in shapes.items():
        tensor = (draw.standard_normal(shape) * 0.3).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name or "attn_v" in name else None
        file.add_tensor(f"{name}.weight", gguf.quants.quantize(tensor, kind) if kind else tensor, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_a_gguf_model_is_tuned_saved_and_replayed(options: Options, tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    options = dataclasses.replace(options, model=str(tmp_path / "small.gguf"), max_length=64)
    summary = finetune(options)
    assert summary.objective == "prompt"
    again = dataclasses.replace(options, model=str(summary.output.checkpoint), output=tmp_path / "again", lr=0.0)
    assert finetune(again).result.loss[0] == summary.result.loss[1]
    code, said = command("replay", options.model, summary.output.journal, "-o", tmp_path / "replayed")
    assert code == 0, said
    one, two = tensors(summary.output.checkpoint), tensors(tmp_path / "replayed")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gguf_without_its_package_and_without_a_file(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FinetuneError, match=r"none\.gguf' is not a file here"):
        finetune(dataclasses.replace(options, model="none.gguf"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FinetuneError, match="reading GGUF needs the package gguf; install it with: pip install gguf"):
        finetune(dataclasses.replace(options, model=str(tmp_path / "a.gguf")))

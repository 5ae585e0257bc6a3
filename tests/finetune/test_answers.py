"""The answer objective: the loss on an answer's tokens, what a model writes, chats, and runs that go on."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

from tests.finetune import test_choices, test_finetune  # noqa: E402
from tests.finetune.test_columns import written  # noqa: E402
from tests.finetune.test_fitting import byte_level  # noqa: E402
from zokern import ZokernWarning  # noqa: E402
from zokern.cli import app  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune  # noqa: E402
from zokern.finetune.answering import Answers  # noqa: E402
from zokern.finetune.examples import Example  # noqa: E402
from zokern.finetune.framing import Frame  # noqa: E402
from zokern.finetune.prompts import Prompt  # noqa: E402
from zokern.finetune.run import run  # noqa: E402
from zokern.finetune.tasks import evaluate  # noqa: E402
from zokern.tasks.metrics import METRICS, token_f1  # noqa: E402

models_dir, t5_dir = test_finetune.models_dir, test_choices.t5_dir
ANIMALS, FRUITS = test_finetune.ANIMALS, test_finetune.FRUITS
CHAT = "{% for m in messages %}is {{ m.content }} here{% endfor %}{% if add_generation_prompt %} Topic :{% endif %}"


def examples(count: int = 20) -> list[Example]:
    return [
        Example((f"the {ANIMALS[i % 6]} {i}",), answers=(" ".join(FRUITS[: 1 + i % 3]), "kiwi")) for i in range(count)
    ]


def task_of(kind: str, root: Path, max_answer: int = 6, **more: Any) -> Answers:
    model, tok = test_finetune.load(kind, root, "answer", [])
    return Answers(model, tok, Frame(tok, "{text} is", 32, **more), 64, max_answer)


@torch.no_grad()
def greedy(task: Answers, prompt: list[int]) -> list[int]:
    """Token by token, without cache and padding."""
    said, ids = [], torch.tensor([prompt])
    while len(said) < task.max_answer and 3 not in said:
        if task.frame.encoder:
            logits = task.model(input_ids=ids, decoder_input_ids=torch.tensor([[0, *said]])).logits
        else:
            logits = task.model(input_ids=torch.tensor([[*prompt, *said]])).logits
        said.append(int(logits[0, -1].argmax()))
    return said


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_loss_and_text_are_their_definition(kind: str, models_dir: Path, t5_dir: Path) -> None:
    task = task_of(".", t5_dir, encoder=True) if kind == "t5" else task_of("gpt", models_dir)
    settings: Any = task.model.generation_config  # a checkpoint may ask for anything
    settings.update(do_sample=True, repetition_penalty=5.0, num_beams=2, min_length=5, no_repeat_ngram_size=1)
    texts = examples()
    task.add("eval", data.TextSet([*texts], [0] * 20))
    wanted = [7, 3, 0, *range(10, 20)]
    batch = task.batch("eval", wanted)
    losses = []
    for i in wanted:
        prompt = torch.tensor([task.asks["eval"][i]])
        end = task.tokenizer(texts[i].answers[0], add_special_tokens=kind == "t5")["input_ids"]
        end = torch.tensor([[*end, *([3] if kind == "gpt" else [])]])
        if kind == "t5":
            logits = task.model(input_ids=prompt, labels=end).logits[0]
        else:
            logits = task.model(torch.cat([prompt, end], 1)).logits[0, prompt.shape[1] - 1 : -1]
        losses.append(-logits.log_softmax(-1).gather(1, end.T).mean())
    torch.testing.assert_close(task.loss(batch), torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    prompts = [task.asks["eval"][i] for i in wanted]
    assert len({len(prompt) for prompt in prompts}) > 1  # so that some are padded
    right = [greedy(task, prompt) for prompt in prompts]
    settings.suppress_tokens = sorted({token for tokens in right for token in tokens})
    assert task.judged(batch).said == [task.tokenizer.decode(one, skip_special_tokens=True).strip() for one in right]
    assert task.model.generation_config is settings
    assert any(right)
    task._warned = True  # of an empty one
    score, _ = evaluate(task, "eval", 7)
    assert score == pytest.approx(token_f1(task.written(task.asks["eval"]), [list(text.answers) for text in texts]))


def test_long_answers_are_cut_where_they_are_learnt_and_told(models_dir: Path) -> None:
    task = task_of("gpt", models_dir, max_answer=3)
    task.add("train", data.TextSet([*examples()], [0] * 20))
    assert task.notes == ["train: 6 of 20 answers are cut to 3 tokens; --max-answer 4 cuts none"]
    assert max(task.kept["train"].counts.tolist()) == 3
    with pytest.raises(FinetuneError, match=r"--max-length is 32; allowed: at most 24, .* the prompt has up to 40"):
        task_of("gpt", models_dir, max_answer=40)


@pytest.mark.parametrize("one_line", [True, False])
def test_an_answer_ends_with_its_line(one_line: bool, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("gpt", models_dir)
    task.add("train", data.TextSet([Example(("cat",), answers=("fig" if one_line else "fig\nplum",))], [0]))
    monkeypatch.setattr(task.tokenizer, "batch_decode", lambda *_, **__: ["\n fig \nplum "], raising=False)
    assert task.written([[1, 2]]) == ["fig" if one_line else "fig \nplum"]


def test_empty_answers_are_warned_of_once(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("gpt", models_dir)
    task.add("eval", data.TextSet([*examples(4)], [0] * 4))
    monkeypatch.setattr(task, "written", lambda prompts: ["fig", *[""] * (len(prompts) - 1)])
    with pytest.warns(ZokernWarning, match="3 of 4 answers that the model wrote are empty"):
        evaluate(task, "eval", 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(task, "eval", 64)


def test_a_chat_is_the_tokenizers_own(models_dir: Path) -> None:
    with pytest.raises(FinetuneError, match="--chat: the tokenizer of --model has no chat template"):
        task_of("gpt", models_dir, chat=True)
    model, tok = test_finetune.load("gpt", models_dir, "answer", [])
    tok.chat_template = CHAT
    task = Answers(model, tok, Frame(tok, "{text} a", 9, chat=True), 64, 4)
    task.add(
        "train", data.TextSet([Example(("cat " * 9,), answers=("fig",)), Example(("cow",), answers=("fig",))], [0, 0])
    )
    texts = [tok.decode(ids[:length]) for ids, length in zip(*vars_of(task.sets["train"][0]), strict=True)]
    assert texts == [
        "is cat cat cat cat a here Topic : fig [SEP]",
        "is cow a here Topic : fig [SEP]",
    ]  # the text is cut
    assert task.cuts["train"].count == 1


@torch.no_grad()
def test_label_words_in_a_chat(models_dir: Path) -> None:
    """The words follow the model's turn, without a space, and are scored as after the same tokens without a chat."""
    model, tok = test_finetune.load("gpt", models_dir, "prompt", ["animal", "fruit"])
    tok.chat_template = CHAT
    chat = Prompt(model, tok, ["animal", "fruit"], 32, "{text}", ["animal", "big fruit"], chat=True)
    plain = Prompt(model, tok, ["animal", "fruit"], 32, "is {text} here Topic :", ["animal", "big fruit"])
    for task in (chat, plain):
        task.add("eval", test_finetune.TEXTS)
    assert torch.equal(*(task.logits(task.batch("eval", range(40))) for task in (chat, plain)))
    byte = copy.deepcopy(byte_level())
    byte.chat_template = "<user>{{ messages[0].content }}<model>"
    frame = Frame(byte, "{text}?", 30, chat=True)
    said = [frame.prompts(["so"])[0][0] + end for end in frame.going_on([" good", "bad "], str)]
    assert byte.batch_decode(said) == ["<user>so?<model>good", "<user>so?<model>bad"]
    tok.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(
        FinetuneError, match=r"--chat: the tokenizer's chat template does not take one turn of a user \(no users"
    ):
        Prompt(model, tok, ["animal", "fruit"], 32, "{text}", ["animal", "fruit"], chat=True)


def vars_of(rows: Any) -> tuple[list[list[int]], list[int]]:
    return rows.ids.tolist(), rows.lengths


def test_what_fits_and_what_does_not(models_dir: Path, tmp_path: Path) -> None:
    task = task_of("gpt", models_dir)
    with pytest.raises(FinetuneError, match="--metric matthews compares classes, and answers are texts"):
        task.check_metric(METRICS["matthews"])
    lines = [{"q": "cat", "a": ["fig", ""]}, {"q": "dog", "a": ""}, {"q": "cow", "a": []}, {"q": "hen", "a": 3}]
    options = Options(data=written(tmp_path / "t.jsonl", lines), objective="answer", answer="a", template="{q}")
    part = data.read(options.data, options)[0]
    assert [text.answers for text, _ in part.pairs] == [("fig",), ("3",)]
    assert part.left_out.said() == [
        "2 rows left out, as --answer has no text for them: first " + part.left_out.first["no answer"]
    ]
    options.answer = "b"
    with pytest.raises(FinetuneError, match=r"line 1: no column 'b'; .* Choose one with --answer"):
        data.read(options.data, options)
    options.answer = "a"
    with pytest.raises(FinetuneError, match="where a list of texts is needed; choose another with --answer"):
        data.read(written(tmp_path / "t.jsonl", [{"q": "cat", "a": [{"text": "fig"}]}]), options)


def test_a_run_says_its_metric_and_goes_on_with_the_same_bits(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [{"q": f"the {ANIMALS[i % 6]} {i}", "a": [FRUITS[i % 6]]} for i in range(30)]
    options = Options(
        model=str(models_dir / "gpt"), data=written(tmp_path / "t.jsonl", lines), output=tmp_path / "out", steps=4, lr=1e-3,
        eval_every=2, log_every=1, batch_size=4, max_length=32, max_answer=4, device="cpu", threads=1, template="{q} is",
        answer="a", lr_schedule="constant",
    )  # fmt: skip
    summary = finetune(options)
    assert (summary.objective, summary.metric) == ("answer", "token_f1")
    said = capsys.readouterr().out
    assert "held out  token f1" in said
    assert "0 labels" not in said
    found = json.loads((options.output / "run.json").read_text())["summary"]
    assert (found["metric"], found["score_after"]) == ("token_f1", summary.result.accuracy[1])
    assert "accuracy_after" not in found
    records = test_finetune.records(options.output)
    assert [(r["step"], r["metric"], "accuracy" in r) for r in records if r["kind"] == "eval"] == [
        (0, "token_f1", False), (2, "token_f1", False), (4, "token_f1", False)]  # fmt: skip
    options.steps, options.output = 2, tmp_path / "half"
    finetune(options)
    options.steps = 4
    run(options, resume=True, given={"steps": 4})
    again = test_finetune.records(options.output)
    times = {"seconds"}
    assert [{k: v for k, v in r.items() if k not in times} for r in again] == [
        {k: v for k, v in r.items() if k not in times} for r in records]  # fmt: skip
    weights = [
        (root / "checkpoint" / "model.safetensors").read_bytes() for root in (tmp_path / "out", tmp_path / "half")
    ]
    assert weights[0] == weights[1]
    replay = ["replay", options.model, options.output / "journal.zkj", "-o", tmp_path / "again"]
    made = CliRunner().invoke(app, list(map(str, replay)))
    assert made.exit_code == 0, made.output
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights[0]

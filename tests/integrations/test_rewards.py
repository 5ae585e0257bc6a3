"""RewardTrainer: what a model writes is judged inside the closure, and the weights climb."""

from __future__ import annotations

import copy
import gc
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import VOCABULARY, arguments, equal, llama, weights, words

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from zokern.integrations.completions import Prompts, Writer
from zokern.integrations.notes import Notes
from zokern.integrations.rewards import Rewards, means
from zokern.integrations.trl import RewardTrainer

ROWS = [{"prompt": f"w{i % 7} w{i % 5}" + " w3" * (i % 3), "wanted": f"w{i % 4}"} for i in range(12)]


WORDS_ONLY = {"max_new_tokens": 5, "suppress_tokens": [0, 1, 2]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


def even(completions: list[str], **_: Any) -> list[float]:
    """The share of words with an even number: changes with the weights in small steps."""
    return [sum(int(w[1:]) % 2 == 0 for w in text.split()) / max(len(text.split()), 1) for text in completions]


def low(completions: list[str], **_: Any) -> list[float]:
    """How low the words' numbers are, 0 to 1."""
    return [1.0 - sum(int(w[1:]) for w in text.split()) / 15 / max(len(text.split()), 1) for text in completions]


def hits(completions: list[str], wanted: list[str], **_: Any) -> list[float | None]:
    return [float(one in text.split()) if one != "w0" else None for text, one in zip(completions, wanted, strict=True)]


def trainer(folder: Path, model: Any = None, rewards: Any = even, **more: Any) -> RewardTrainer:
    args = more.pop("args", None) or arguments(folder, learning_rate=3e-2, max_steps=4, logging_steps=1)
    more.setdefault("zo", {"num_directions": 4, "eps": 0.3})
    more.setdefault("generation", WORDS_ONLY)
    return RewardTrainer(model or llama(), rewards, args, ROWS, ROWS[:3], words(), **more)


def test_steps_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    """Two rewards with weights, over micro-batches of different sizes, greedy."""
    batches: list[Any] = []

    class Seen(RewardTrainer):
        def step_options(self, micro: list[Any], count: Any) -> dict[str, Any]:
            batches.append(micro)
            return super().step_options(micro, count)

    model = llama()
    by = copy.deepcopy(model)
    args = arguments(
        tmp_path, learning_rate=3e-2, max_steps=3, gradient_accumulation_steps=3, per_device_train_batch_size=5,
        lr_scheduler_type="constant", logging_steps=1,
    )  # fmt: skip
    run = Seen(
        model, {"even": even, "hit": hits}, args, ROWS, processing_class=words(), reward_weights={"hit": 2.0},
        generation=WORDS_ONLY, zo={"method": "es", "num_directions": 3, "eps": 0.3, "antithetic": True},
    )  # fmt: skip
    run.train()
    assert [[len(one["rows"]) for one in micro] for micro in batches] == [[5, 5, 2]] * 3

    opt = zokern.ES(by.eval(), lr=3e-2, num_directions=3, eps=0.3, antithetic=True, maximize=True)
    tokenizer = words()

    def closure(batch: Any) -> float:
        out = by.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, pad_token_id=0,
            **WORDS_ONLY,
        )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        hit = hits(texts, [row["wanted"] for row in batch["rows"]])
        return sum(even(texts)) / len(texts) + 2.0 * (sum(h or 0.0 for h in hit) / len(texts))

    for micro in batches:
        opt.step(closure, micro, batch_weights=[len(one["rows"]) for one in micro])
    assert equal(weights(model), weights(by))
    assert opt.counters["forwards"] == run.zo_optimizer.counters["forwards"] == 6 * 9

    line = next(line for line in run.state.log_history if "reward" in line)
    assert line["loss"] == pytest.approx(-line["reward"], abs=0.2)  # the one weighs micro-batches by their rows
    assert {"rewards/even", "rewards/hit", "completion_length", "empty_completions"} <= line.keys()


METHODS: dict[str, dict[str, Any]] = {
    "es": {"num_directions": 8, "antithetic": True, "placement": "inplace"},
    "fzoo": {"candidates": 12, "placement": "shadow"},
    "mezo": {"num_samples": 6, "placement": "stream"},
}
RATES = {"es": 0.18, "fzoo": 6e-2, "mezo": 0.6}


def climbing(folder: Path, method: str, steps: int, **generation: Any) -> RewardTrainer:
    args = arguments(
        folder, learning_rate=RATES[method], max_steps=steps, save_strategy="steps", save_steps=2, logging_steps=1,
        per_device_train_batch_size=12, lr_scheduler_type="constant",
    )  # fmt: skip
    zo = {"method": method, "eps": 0.2, **METHODS[method]}
    return trainer(folder, rewards=low, args=args, zo=zo, generation={**WORDS_ONLY, "max_new_tokens": 3, **generation})


@pytest.mark.parametrize("method", METHODS)
def test_climbs(tmp_path: Path, method: str) -> None:
    run = climbing(tmp_path, method, 10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a step moves", zokern.ZokernWarning)
        run.train()
    lines = [line for line in run.state.log_history if "reward" in line]
    assert all(("projected_gradient" in line) == (method != "es") for line in lines)  # ES measures no slope
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards


@pytest.mark.parametrize("sampled", [False, True])
def test_resumes_bit_for_bit(tmp_path: Path, sampled: bool) -> None:
    generation = {"do_sample": True, "top_k": 0} if sampled else {}
    whole = climbing(tmp_path, "es", 4, **generation)
    whole.train()
    again = climbing(tmp_path, "es", 4, **generation)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(whole.model), weights(again.model))
    assert whole.zo_optimizer.paired_randomness == (True if sampled else "auto")
    base = llama()
    assert zokern.journal.replay(tmp_path / "journal.zkj", base) == 4
    assert equal(weights(base), weights(whole.model))


def test_samples_are_the_same_in_all_forwards_of_a_step(tmp_path: Path) -> None:
    """At a radius that changes no probability to speak of; the next step draws others."""
    written: list[list[str]] = []

    def keep(completions: list[str], **_: Any) -> list[float]:
        written.append(completions)
        return [1.0] * len(completions)

    args = arguments(tmp_path, max_steps=2, learning_rate=0.0, per_device_train_batch_size=12)
    generation = {**WORDS_ONLY, "do_sample": True, "top_k": 0}
    run = trainer(tmp_path, rewards=keep, args=args, generation=generation, zo={"num_directions": 3, "eps": 1e-7})
    run.train()
    assert written[0] == written[1] == written[2]
    assert sorted(written[0]) != sorted(written[3])


def test_evaluation_has_the_reward(tmp_path: Path) -> None:
    run = trainer(tmp_path, reward_weights=[3.0])
    found = run.evaluate()
    writer, tokenizer = run.writer, words()
    texts, _ = writer.write(run.model, Prompts(tokenizer, None)(ROWS[:3]))
    assert found["eval_rewards/even"] == pytest.approx(sum(even(texts)) / 3)
    assert found["eval_reward"] == pytest.approx(sum(even(texts)))
    assert found["eval_loss"] == pytest.approx(-found["eval_reward"])


def test_messages_columns_and_what_the_functions_get(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def keep(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.append({"prompts": prompts, "completions": completions, **columns})
        return [float(len(ids)) for ids in columns["completion_ids"]]

    rows = [{"prompt": [{"role": "user", "content": f"w{i} w2"}], "id": i} for i in range(4)]
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0)
    run = RewardTrainer(
        llama(),
        keep,
        args,
        rows,
        processing_class=words(),
        zo={"num_directions": 2},
        generation={"max_new_tokens": 3, "suppress_tokens": [0, 1, 2]},
    )
    assert args.remove_unused_columns  # the user's own stay as they were
    run.train()
    one = seen[0]
    assert len(seen) == 2
    assert [row["id"] for row in rows if row["prompt"] in one["prompts"]] == sorted(one["id"])
    assert one["trainer_state"] is run.state
    for (message,), ids in zip(one["completions"], one["completion_ids"], strict=True):
        assert message["role"] == "assistant"
        assert message["content"] == words().decode(ids, skip_special_tokens=True)


def test_prompts_are_padded_on_the_left_and_judged_as_alone() -> None:
    tokenizer = words()
    model = llama().eval()
    make = Prompts(tokenizer, None)
    writer = Writer(model, tokenizer, WORDS_ONLY, Notes())
    rows = [{"prompt": "w1 w2 w3 w4"}, {"prompt": "w5"}]
    batch = make(rows)
    assert batch["input_ids"][1].tolist()[:3] == [0, 0, 0]
    together, _ = writer.write(model, batch)
    alone = [writer.write(model, make([row]))[0][0] for row in rows]
    assert together == alone


def test_an_empty_completion_is_told_once(tmp_path: Path) -> None:
    """A model that always ends; and rewards that are always the same are told once too."""
    others = [token for token in range(VOCABULARY) if token != 2]
    args = arguments(tmp_path, max_steps=6, learning_rate=0.0, logging_steps=3)
    run = trainer(
        tmp_path, args=args, generation={"max_new_tokens": 5, "suppress_tokens": others}, zo={"num_directions": 2}
    )
    with pytest.warns(zokern.ZokernWarning) as told:
        run.train()
    texts = [str(one.message) for one in told]
    assert sum("is empty: the model ends at once" in text for text in texts) == 1
    assert sum("all completions had the same reward: nothing is learnt" in text for text in texts) == 1
    line = [line for line in run.state.log_history if "reward" in line][-1]
    assert line["flat_steps"] == 6
    assert line["empty_completions"] == 1.0


def test_functions_that_do_not_fit(tmp_path: Path) -> None:
    def refuse(match: str, error: type[Exception], functions: Any, weights: Any = None) -> None:
        with pytest.raises(error, match=match):
            Rewards(functions, weights)

    refuse("reward_funcs is empty", ValueError, [])
    refuse("two functions called 'even'; give a dict by name", ValueError, [even, even])
    refuse("'str' is a str; give a function", TypeError, "org/reward-model")
    refuse("is a Linear; give a function", TypeError, torch.nn.Linear(2, 1))

    async def slow(**_: Any) -> list[float]:
        return []

    refuse("'slow' is async", TypeError, slow)

    class Slow:
        async def __call__(self, **_: Any) -> list[float]:
            return []

    refuse("'Slow' is async", TypeError, Slow())
    refuse("reward_weights must be a list or a dict by name, got str", TypeError, even, "1")
    refuse("reward_weights has 2 numbers, and reward_funcs 1", ValueError, even, [1.0, 2.0])
    refuse("reward_weights has 'odd', and reward_funcs 'even'", ValueError, even, {"odd": 1.0})
    refuse(r"reward_weights\['even'\]", TypeError, even, {"even": "much"})

    def judged(function: Any, match: str, error: type[Exception]) -> None:
        with pytest.raises(error, match=match):
            Rewards({"r": function}).each(prompts=["a", "b"], completions=["c", "d"])

    judged(lambda **_: 1.0, "'r' returned a float; a list", TypeError)
    judged(lambda **_: [1.0], "'r' returned 1 rewards for 2 completions", ValueError)
    judged(lambda **_: [1.0, "x"], "'r' returned a str for completion 1", TypeError)
    judged(lambda **_: [1.0, float("nan")], "'r' returned nan for completion 1; return None", ValueError)
    some = Rewards({"r": lambda **_: [torch.tensor(3.0), None]})
    assert means(some.each(prompts=["a", "b"], completions=["", ""])) == {"r": 1.5}
    with pytest.warns(zokern.ZokernWarning, match="no reward function applies to the prompt 'b'"):
        some.notes.tell()


def test_an_error_in_a_reward_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    calls: list[int] = []

    def fails(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("the judge is out")
        return even(completions)

    model = llama()
    with pytest.raises(KeyError, match="the judge is out"):
        trainer(tmp_path, model, fails, zo={"num_directions": 4, "eps": 0.3, "placement": "shadow"}).train()
    assert equal(weights(model), weights(llama()))


def test_what_a_run_refuses(tmp_path: Path) -> None:
    def refuse(match: str, error: type[Exception], **more: Any) -> None:
        with pytest.raises(error, match=match):
            trainer(tmp_path, **more)

    refuse("model is a Linear, which does not generate", TypeError, model=torch.nn.Linear(2, 2))
    refuse("batched must be True, False or a number, .*; got str", TypeError, batched="all")
    refuse("journal is 'x.zkj'; it must be True or False", TypeError, journal="x.zkj")
    refuse("GenerationConfig has no 'max_tokens'", ValueError, generation={"max_tokens": 4})
    refuse("num_return_sequences must be 1", ValueError, generation={"num_return_sequences": 2})
    model = llama()
    refuse("MeZO has maximize=False, and the trainer's reward is to rise; give maximize=True", ValueError, model=model,
           optimizers=(zokern.MeZO(model, lr=1.0), None), zo=None)  # fmt: skip
    with pytest.raises(ValueError, match="processing_class is missing"):
        RewardTrainer(llama(), even, arguments(tmp_path), ROWS)
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        RewardTrainer(llama(), args=arguments(tmp_path), train_dataset=ROWS, processing_class=words())

    make = Prompts(words(), 3)
    with pytest.raises(ValueError, match="the dataset has no column 'prompt'; it has 'question'"):
        make([{"question": "w1"}])
    with pytest.raises(ValueError, match=r"a prompt has 4 tokens, .* room for 3: 'w1 w2 w3 w4'"):
        make([{"prompt": "w1"}, {"prompt": "w1 w2 w3 w4"}])
    with pytest.raises(TypeError, match="a prompt is a int; it must be a text or a list of messages"):
        make([{"prompt": 3}])
    assert os.listdir(tmp_path) == []

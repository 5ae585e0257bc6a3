"""RewardTrainer(batched=True): the directions of a step write in one generate()."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import arguments, counted, equal, llama, weights, words

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from zokern.integrations.completions import Writer
from zokern.integrations.trl import RewardTrainer

ROWS = [{"prompt": f"w{i % 7} w{i % 5}" + " w3" * (i % 3), "wanted": [f"w{i % 4}"] * 4} for i in range(12)]
WORDS_ONLY = {"max_new_tokens": 4, "suppress_tokens": [0, 1, 2]}
LOW = {"placement": "forward", "distribution": "lowrank:1"}
ES = {"method": "es", "num_directions": 4, "antithetic": True, "eps": 0.3, **LOW}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


def low(completions: list[str], wanted: list[list[str]], **_: Any) -> list[float | None]:
    """How low the words' numbers are; does not apply to some."""
    each = [1.0 - sum(int(w[1:]) for w in text.split()) / 15 / max(len(text.split()), 1) for text in completions]
    assert all(len(one) == 4 for one in wanted)  # a column is a row's own, also where it is as long as the batch
    return [None if one[0] == "w3" else value for one, value in zip(wanted, each, strict=True)]


def every(completions: list[str], **_: Any) -> list[float | None]:
    """The same, of all."""
    return low(completions, [["w0"] * 4] * len(completions))


def unlike(completions: list[str], **_: Any) -> list[float]:
    """Which share of the others it is unlike: compares what it is given."""
    return [sum(one != other for other in completions) / len(completions) for one in completions]


def trainer(folder: Path, model: Any = None, rewards: Any = None, **more: Any) -> RewardTrainer:
    usual = {"max_steps": 3, "learning_rate": 3e-2, "logging_steps": 1, "per_device_train_batch_size": 4}
    args = arguments(folder, **{**usual, "lr_scheduler_type": "constant", **more.pop("given", {})})
    more = {"zo": ES, "generation": WORDS_ONLY, "batched": True, **more}
    made = {"low": low, "unlike": unlike} if rewards is None else rewards
    return RewardTrainer(model or llama(), made, args, ROWS, ROWS[:3], words(), **more)


METHODS: dict[str, dict[str, Any]] = {
    "es": ES,
    "fzoo": {"method": "fzoo", "candidates": 5, "eps": 0.3, **LOW},
    "mezo": {"method": "mezo", "num_samples": 3, "eps": 0.3, **LOW},
}
PROBES = {"es": 8, "fzoo": 6, "mezo": 6}


@pytest.mark.parametrize("method", METHODS)
def test_rewards_are_those_of_one_after_another(tmp_path: Path, method: str) -> None:
    """With functions that compare what they are given, and a column that is as long as a batch."""
    model = llama()
    by = copy.deepcopy(model)
    run = trainer(tmp_path / "a", model, zo=METHODS[method])
    run.train()
    alone = trainer(tmp_path / "b", by, zo=METHODS[method], batched=False)
    alone.train()
    assert equal(weights(model), weights(by))
    lines, others = ([line for line in one.state.log_history if "reward" in line] for one in (run, alone))
    assert len(lines) == len(others) == 3
    for line, other in zip(lines, others, strict=True):
        assert line.pop("probes_per_forward") == (1 if line is lines[0] else PROBES[method])
        same = [name for name in other if name not in ("forwards", "epoch")]
        assert {name: line[name] for name in same} == {name: other[name] for name in same}
    assert lines[2]["forwards"] - lines[1]["forwards"] == 1 < others[2]["forwards"] - others[1]["forwards"]


def test_at_most_so_many_and_micro_batches(tmp_path: Path) -> None:
    """Of unlike sizes."""
    given = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5, "max_steps": 2}
    model = llama()
    by = copy.deepcopy(model)
    run = trainer(tmp_path / "a", model, batched=4, given=given)
    run.train()
    trainer(tmp_path / "b", by, batched=False, given=given).train()
    assert run.state.log_history[1]["probes_per_forward"] == 4
    assert equal(weights(model), weights(by))


def test_forwards_that_test_the_rows_are_not_logged_or_told(tmp_path: Path) -> None:
    """Their directions are no probes: what functions log there, and empty completions, say nothing of the step."""
    seen: list[bool] = []

    def noted(completions: list[str], log_metric: Any, **_: Any) -> list[float | None]:
        seen.append(run.zo_optimizer.testing_rows)
        log_metric("tests", float(seen[-1]))
        if seen[-1]:
            run.notes.add("test", "of a test")
        return every(completions)

    run = trainer(tmp_path, rewards=noted)
    run.train()  # and a warning would be an error
    assert any(seen)
    assert not all(seen)
    assert [line["tests"] for line in run.state.log_history if "tests" in line] == [0.0, 0.0, 0.0]


def test_sampled_rows_draw_each_their_own_and_climb(tmp_path: Path) -> None:
    given = {"max_steps": 12, "learning_rate": 0.18, "per_device_train_batch_size": 12}
    zo = {**ES, "num_directions": 8, "eps": 0.2}
    run = trainer(tmp_path, rewards=every, given=given, zo=zo, generation={**WORDS_ONLY, "do_sample": True})
    run.train()
    rewards = [line["reward"] for line in run.state.log_history if "reward" in line]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    assert run.state.log_history[-2]["probes_per_forward"] == 16


def test_sampled_texts_that_end_early_keep_apart(tmp_path: Path) -> None:
    """How many numbers a micro-batch draws depends on when the last of its texts ends: that is no mixing of rows."""

    def tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [len(ids) + sum(ids) / 99 for ids in completion_ids]

    early = {"max_new_tokens": 6, "do_sample": True, "suppress_tokens": [0, 1], "sequence_bias": [[[2], 3.5]]}
    given = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    run = trainer(tmp_path, rewards=tokens, zo={**ES, "num_directions": 2}, generation=early, given=given)
    with run.notes.silent():  # of empty texts
        run.train()  # and a warning would be an error
    assert run.state.log_history[-2]["probes_per_forward"] == 4


def test_a_reward_that_is_not_the_same_twice_is_told(tmp_path: Path) -> None:
    calls = iter(range(1000))
    run = trainer(tmp_path, rewards=lambda completions, **_: [float(next(calls))] * len(completions))
    with pytest.warns(zokern.ZokernWarning, match=r"one after another.*not return the same twice \(a counter"):
        run.train()
    assert run.state.log_history[-2]["probes_per_forward"] == 1


def test_memory_that_ends_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Writer.write

    def small(self: Writer, model: Any, batch: Any) -> Any:
        if len(batch["rows"]) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return write(self, model, batch)

    monkeypatch.setattr(Writer, "write", small)
    with pytest.warns(zokern.ZokernWarning, match="give a number below 8 as batched"):
        trainer(tmp_path, rewards=every).train()
    run = trainer(tmp_path, rewards=every, batched=2)
    run.train()
    assert run.state.log_history[-2]["probes_per_forward"] == 2


@pytest.mark.parametrize(("probes", "texts"), [(4, 9), (8, 14)])
def test_the_first_step_writes_as_often_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probes: int, texts: int
) -> None:
    """N + 3 + log2 N times."""
    write = counted(Writer.write)
    monkeypatch.setattr(Writer, "write", lambda *args: write(*args))
    trainer(tmp_path, rewards=every, zo={**ES, "num_directions": probes // 2}, given={"max_steps": 1}).train()
    assert write.calls == texts


@pytest.mark.parametrize("batched", [True, False])
def test_a_collator_without_rows_is_refused(tmp_path: Path, batched: bool) -> None:
    run = trainer(tmp_path, batched=batched)
    made = run.data_collator
    run.data_collator = lambda rows: {"input_ids": made(rows)["input_ids"]}
    with pytest.raises(ValueError, match="data_collator gives no 'attention_mask', 'rows'; give one"):
        run.train()


def test_rows_of_another_collator(tmp_path: Path) -> None:
    """Rows that are a list like any other, with columns that are as long as the batch."""
    model = llama()
    by = copy.deepcopy(model)
    run = trainer(tmp_path / "a", model)
    made = run.data_collator
    run.data_collator = lambda rows: {**made(rows), "rows": list(rows)}
    run.train()
    trainer(tmp_path / "b", by, batched=False).train()
    assert equal(weights(model), weights(by))
    assert run.state.log_history[-2]["probes_per_forward"] == 8


def test_replays_from_its_journal(tmp_path: Path) -> None:
    model = llama()
    base = copy.deepcopy(model)
    trainer(tmp_path, model).train()
    zokern.journal.replay(tmp_path / "journal.zkj", base)
    assert equal(weights(model), weights(base))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"zo": None}, "zo has None.*'placement': 'forward'"),
        ({"zo": {"method": "fzoo", "placement": "shadow"}}, "zo has 'shadow'"),
        ({"batched": 0}, "batched"),
        ({"batched": "all"}, "batched"),
    ],
)
def test_refused_at_construction(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(tmp_path, **more)


def test_an_optimizer_of_another_placement_is_refused(tmp_path: Path) -> None:
    model = llama()
    opt = zokern.ES(model, lr=1e-2, maximize=True)
    with pytest.raises(ValueError, match=r"zo has 'inplace'"):
        trainer(tmp_path, model, zo=None, optimizers=(opt, None))


def test_the_remedy_of_the_message_works(tmp_path: Path) -> None:
    run = trainer(tmp_path, zo={"method": "es", "placement": "forward", "distribution": "lowrank:1"}, rewards=every,
                  given={"max_steps": 1})  # fmt: skip
    run.train()
    assert run.zo_optimizer.counters["steps"] == 1


def test_a_dataset_in_rows_stays_with_its_tokens() -> None:
    from zokern.integrations.completions import Examples
    from zokern.optim import repeating

    rows = Examples({"prompt": str(i), "tags": ["a", "b"]} for i in range(2))
    batch = {"input_ids": torch.arange(4).view(2, 2), "rows": rows}
    made = repeating.repeated(batch, repeating.size_of(batch, "batch"), 3)
    assert made["rows"] == [*rows] * 3
    assert made["rows"].blocks == 3
    assert all(len(row["tags"]) == 2 for row in made["rows"])
    assert torch.equal(made["input_ids"], batch["input_ids"].repeat(3, 1))

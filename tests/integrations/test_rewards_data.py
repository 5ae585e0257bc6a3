"""RewardTrainer on data, settings and functions that are unlike the usual."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import VOCABULARY, arguments, equal, llama, weights, words

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from zokern.integrations.completions import Prompts, Writer, room  # noqa: E402
from zokern.integrations.notes import Notes  # noqa: E402
from zokern.integrations.rewards import Rewards  # noqa: E402
from zokern.integrations.trl import RewardTrainer  # noqa: E402

ROWS = [{"prompt": f"w{i % 7} w{i % 5}", "wanted": f"w{i % 4}"} for i in range(12)]
WORDS_ONLY = {"max_new_tokens": 3, "suppress_tokens": [0, 1, 2]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


def low(completions: list[str], **_: Any) -> list[float]:
    return [1.0 - sum(int(w[1:]) for w in text.split()) / 45 for text in completions]


def trainer(folder: Path, model: Any = None, rewards: Any = low, data: Any = ROWS, **more: Any) -> RewardTrainer:
    args = more.pop("args", None) or arguments(folder, max_steps=2, logging_steps=1, learning_rate=3e-2)
    return RewardTrainer(
        model or llama(), rewards, args, data, more.pop("eval_dataset", None), words(),
        **{"zo": {"num_directions": 2, "eps": 0.3}, "generation": WORDS_ONLY, **more},
    )  # fmt: skip


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
            n_positions=2, eos_token_id=2,
        )
    )  # fmt: skip


def test_a_dataset_with_columns_and_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's own arguments would take the columns away."""
    seen: list[Any] = []

    def keep(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
        seen.extend(wanted)
        return low(completions)

    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_list(ROWS)
    run = RewardTrainer(
        llama(), keep, None, data, processing_class=words(), generation=WORDS_ONLY, zo={"num_directions": 2}
    )
    run.args.max_steps, run.args.report_to = 1, []
    run.train()
    assert set(seen) <= {"w0", "w1", "w2", "w3"}
    assert seen


def test_the_best_model_by_its_reward_with_autocast(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, bf16=True,
        load_best_model_at_end=True, metric_for_best_model="reward", learning_rate=1e-1,
    )  # fmt: skip
    data = datasets.Dataset.from_list(ROWS)
    cast: list[bool] = []

    model = llama()
    model.lm_head.register_forward_hook(lambda *_: cast.append(torch.is_autocast_enabled("cpu")))
    rewards = [low, lambda completions, **_: [None] * len(completions)]
    run = trainer(tmp_path, model, data=data, eval_dataset=data, args=args, rewards=rewards, reward_weights=[2.0, 1.0])
    run.train()
    found = [line["eval_reward"] for line in run.state.log_history if "eval_reward" in line]
    assert all(cast)  # in steps and in evaluations
    assert run.args.greater_is_better
    assert run.state.best_metric == max(found) == run.evaluate()["eval_reward"]


def test_an_encoder_decoder_and_an_adapter_resume_bit_for_bit(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        return peft.get_peft_model(llama(), lora)

    for build, name in ((t5, "t5"), (adapted, "lora")):
        folder = tmp_path / name
        args = arguments(folder, max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-1)
        whole, again = trainer(folder, build(), args=args), trainer(folder, build(), args=args)
        whole.train()
        again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        assert equal(weights(whole.model), weights(again.model))
        assert not equal(weights(whole.model), weights(build()))
    assert room(t5(), 3) is None  # its positions are relative


def test_what_functions_log_and_get_in_trls_way(tmp_path: Path) -> None:
    def told(completions: list[str], log_metric: Any, log_extra: Any, trainer_state: Any, **_: Any) -> list[float]:
        assert not run.model.training  # completions are written as they will be in use
        log_metric("words", len(completions))
        log_metric("done", trainer_state.global_step)
        for number in (1, 3):
            log_metric("two", number)
        log_extra("text", completions)
        return low(completions)

    class Own(RewardTrainer):
        entered = prepared = 0

        def compute_loss_context_manager(self) -> Any:
            self.entered += 1
            return super().compute_loss_context_manager()

        def _prepare_inputs(self, inputs: Any) -> Any:
            self.prepared += 1
            return super()._prepare_inputs(inputs)

    args = arguments(tmp_path, max_steps=2, logging_steps=1, per_device_eval_batch_size=8)
    run = Own(llama(dropout=0.1), told, args, ROWS, ROWS[:10], words(), generation=WORDS_ONLY)
    run.train()
    lines = [line for line in run.state.log_history if "reward" in line]
    assert [line["done"] for line in lines] == [0.0, 1.0]  # of the steps since the last line
    assert [(line["words"], line["two"]) for line in lines] == [(2.0, 2.0)] * 2
    run.entered = run.prepared = 0
    for _ in range(2):
        found = run.evaluate()
        assert found["eval_words"] == (8 * 8 + 2 * 2) / 10  # of a row
        assert found["eval_two"] == 2.0
    assert run.entered == run.prepared == 4
    assert "test_reward" in run.predict(ROWS[:2]).metrics
    run.eval_dataset = []
    assert "eval_reward" not in run.evaluate()


def test_notes_are_told_after_their_step(tmp_path: Path) -> None:
    def none(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    run = trainer(tmp_path, rewards=none, args=arguments(tmp_path, max_steps=1, logging_steps=9))
    with pytest.warns(zokern.ZokernWarning, match="no reward function applies to the prompt"):
        run.train()
    assert run.zo_optimizer.counters["steps"] == 1


def test_rewards_that_become_the_same_are_not_said_to_have_been_so_from_the_start(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    calls: list[int] = []

    def constant(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        return [1.0 if len(calls) > 2 else float(len(calls))] * len(completions)

    args = arguments(tmp_path, max_steps=8, learning_rate=0.0, logging_steps=4)
    run = trainer(tmp_path, rewards=constant, args=args)
    run.train()
    assert run.zo_optimizer.flat_steps == 7
    assert not [one for one in recwarn if "all completions had the same reward" in str(one.message)]


def test_columns_that_cannot_be_handed_on(tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "completions": 3}] * 4
    with pytest.raises(ValueError, match="a column 'completions', and reward functions get another thing by that name"):
        trainer(tmp_path, data=rows).train()
    rows = [{"prompt": "w1", "id": 1}, {"prompt": "w1"}]
    args = arguments(tmp_path, per_device_train_batch_size=2, max_steps=1)
    batch = Prompts(words(), None)(rows)
    with pytest.raises(ValueError, match="some rows of the dataset have a column 'id' and others have not"):
        trainer(tmp_path, args=args).judge(llama(), batch, {})
    rows = [{"prompt": "w1", "completion": "w2", "completion_ids": [3]}] * 4  # as TRL: they are left out
    trainer(tmp_path, data=rows).train()


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt has no tokens: ''; leave it out, or begin it with"):
        Prompts(words(), None)([{"prompt": "w1"}, {"prompt": ""}])


def test_texts_begin_as_the_tokenizer_has_it_and_messages_as_their_template() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = words()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template += "{% if add_generation_prompt %}w9{% endif %}"
    make = Prompts(tokenizer, 3)
    assert make([{"prompt": "w1 w2"}])["input_ids"].tolist() == [[1, 4, 5]]  # as many as there is room for
    spoken = [{"role": "user", "content": "w1"}]
    assert make([{"prompt": spoken}])["input_ids"].tolist() == [[4, 12]]


def test_tokens_that_a_model_or_a_tokenizer_lacks() -> None:
    tokenizer, model = words(), llama()
    tokenizer.pad_token = None
    make = Prompts(tokenizer, None)
    assert (tokenizer.pad_token, make.tokenizer.pad_token) == (None, "</s>")  # the user's own stays as it was
    own = model.generation_config
    own.pad_token_id, own.eos_token_id, own.use_cache = None, None, False
    config = Writer(model, make.tokenizer, {}, Notes()).config
    assert (config.pad_token_id, config.eos_token_id, config.use_cache) == (2, 2, True)
    assert (own.pad_token_id, own.eos_token_id, own.use_cache) == (None, None, False)
    assert Writer(model, make.tokenizer, {"eos_token_id": [2, 9]}, Notes()).ends == {2, 9}


def test_how_much_room_a_prompt_has() -> None:
    from types import SimpleNamespace

    assert room(llama(), 5) == 16 - 5
    bart = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16, is_encoder_decoder=True))
    assert room(bart, 5) == 16  # what it writes has positions of its own


def test_rewards_that_are_no_numbers() -> None:
    for one, kind in (("1.5", "str"), (torch.ones(2), "Tensor")):
        with pytest.raises(TypeError, match=f"'r' returned a {kind} for completion 0; a number or None"):
            Rewards({"r": lambda one=one, **_: [one]}).each(prompts=["a"], completions=["b"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": 8}, "max_length would count the prompt too; give max_new_tokens"),
        ({"max_new_tokens": None}, "max_new_tokens is None; give the most tokens"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate must be left out"),
        ({"num_return_sequences": 2}, "num_return_sequences must be 1"),
    ],
)
def test_generation(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"generation: {message}"):
        Writer(llama(), words(), given, Notes())


def test_a_stop_string_ends_a_completion() -> None:
    """generate finds it with the tokenizer, and pads what comes after it, without an end."""
    model, tokenizer = llama(), words()

    def generate(tokenizer: Any, **_: Any) -> torch.Tensor:
        assert tokenizer is not None
        return torch.tensor([[3, 4, 5, 6, 0, 0], [3, 4, 5, 2, 0, 0], [3, 4, 5, 0, 6, 7]])

    model.generate = generate  # type: ignore[method-assign, assignment]
    writer = Writer(model, tokenizer, {"stop_strings": ["w3"]}, Notes())
    texts, ids = writer.write(model, Prompts(tokenizer, None)([{"prompt": "w0 w1"}] * 3))
    assert ids == [[5, 6], [5], [5, 0, 6, 7]]
    assert texts == ["w2 w3", "w2", "w2 w3 w4"]

    writer = Writer(t5(), tokenizer, {}, Notes())
    model.generate = lambda **_: torch.tensor([[0, 5, 6, 2]])  # type: ignore[method-assign, assignment]
    assert writer.write(model, Prompts(tokenizer, None)([{"prompt": "w0 w1"}])) == (["w2 w3"], [[5, 6]])


def test_the_models_own_ways_of_drawing_hold_where_it_samples(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.update(do_sample=True, top_k=1)
    greedy = Writer(model, words(), WORDS_ONLY, Notes())
    drawn = Writer(model, words(), {**WORDS_ONLY, "do_sample": True}, Notes())
    assert (greedy.samples, drawn.samples) == (False, True)
    batch = Prompts(words(), None)([{"prompt": "w0 w1"}] * 4)
    assert drawn.write(model.eval(), batch) == greedy.write(model.eval(), batch)  # top_k=1 leaves one token


def test_metrics_of_a_training_that_was_broken_off_are_forgotten(tmp_path: Path) -> None:
    run = trainer(tmp_path, args=arguments(tmp_path, max_steps=1, logging_steps=2))
    run.train()
    assert run._seen["reward"]
    run.begin_books()
    assert not run._seen

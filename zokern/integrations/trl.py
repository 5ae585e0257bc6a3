"""Rewards climbed by forwards alone: the model writes, functions judge it, and the weights move along what paid.

    from zokern.integrations.trl import RewardTrainer

    def brief(completions, **columns):
        return [-len(text) for text in completions]

    RewardTrainer(model, reward_funcs=brief, args=args, train_dataset=prompts, processing_class=tokenizer).train()

Reward functions have TRL's form, so those written for its GRPOTrainer serve. No TRL is needed for this trainer; TRL's SFT,
DPO and reward-model trainers take zeroth-order steps by the mixin: class ZODPOTrainer(DPOTrainer, ForwardOnly).
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from zokern.integrations.completions import Examples, Prompts, Writer, mean, room
from zokern.integrations.notes import Notes
from zokern.integrations.rewards import Reward, Rewards, columns, means, no_table
from zokern.integrations.transformers import ZOTrainer
from zokern.optim import examples
from zokern.optim.flat import IN_A_ROW

_SIZES = "sizes of the batches"


class RewardTrainer(ZOTrainer):
    """Climbs the mean reward of what a language model writes:

        R(theta) = (1/n) sum_i sum_k w_k r_k(prompt_i, completion_i(theta))

    over the n prompts of a step, each forward of which writes n completions. Greedy, R is a function of the weights;
    sampled, all forwards of a step draw the same numbers. The reward may be anything: no gradient of it is needed.

    Args:
        model: causal or encoder-decoder, with `generate`; a PeftModel too.
        reward_funcs: a function reward(prompts, completions, **columns) that returns a number or None for each, a list of
            functions, or a dict of them by name. It gets every other column of the dataset as a list, `completion_ids`,
            `trainer_state`, `log_metric(name, value)`, whose mean is logged, and `log_extra`, which does nothing; take
            **columns for what is not needed. Prompts that are lists of messages have completions of that form:
            [{"role": "assistant", "content": text}].
        args: TrainingArguments. per_device_train_batch_size is of prompts.
        train_dataset, eval_dataset: rows with "prompt", and whatever the functions need.
        processing_class: the tokenizer.
        reward_weights: of the functions, a list or a dict by name. Default: 1 each.
        generation: settings of transformers' GenerationConfig. Default: greedy, 64 new tokens.
        zo: as ZOTrainer's. Default: "es", whose step does not depend on the reward's scale; fzoo and mezo climb too.
        batched: all directions of a step write in one `generate`, or at most that many. Needs zo with
            placement="forward", distribution="lowrank:1". Sampled, each row draws its own. Default: False.
        data_collator: makes batches of "input_ids" and "attention_mask", padded on the left, and "rows".
        optimizers: a zokern optimizer with maximize=True, and a schedule.
        More, by name: what ZOTrainer takes.

    Logged: reward, rewards/NAME, completion_length (tokens), empty_completions (their share); `eval_reward` at evaluation.

    Raises:
        TypeError, ValueError: at construction, naming the argument; in a step, naming the reward function.
    """

    maximize = True
    method = "es"

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Reward | Sequence[Reward] | Mapping[str, Reward] | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        reward_weights: Sequence[float] | Mapping[str, float] | None = None,
        generation: Mapping[str, Any] | None = None,
        batched: bool | int = False,
        **named: Any,
    ) -> None:
        examples.most_of(batched)  # or raises
        self.batched = batched
        if reward_funcs is None:
            raise ValueError("reward_funcs is missing: give a function reward(prompts, completions, **columns)")
        if not callable(getattr(model, "generate", None)):
            raise TypeError(
                f"model is a {type(model).__name__}, which does not generate; give a language model with a head"
            )
        self.notes = Notes()
        self.rewards = Rewards(reward_funcs, reward_weights, self.notes)
        collator = Prompts(processing_class, None)
        self.writer = Writer(model, collator.tokenizer, dict(generation or {}), self.notes)
        collator.room = room(model, self.writer.config.max_new_tokens)
        self._seen: dict[str, list[float]] = defaultdict(list)  # since the last line of the log
        self._held: dict[str, list[float]] = defaultdict(list)  # of an evaluation
        self._sizes: list[float] = []  # of its batches
        if args is None:
            args = TrainingArguments("tmp_trainer", remove_unused_columns=False)  # the functions need them
        elif args.remove_unused_columns:
            args = copy.copy(args)
            args.remove_unused_columns = False
        super().__init__(
            model, args, data_collator=named.pop("data_collator", collator), train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, **named,
        )  # fmt: skip
        if self.batched:
            self._check_placement()

    def _check_placement(self) -> None:
        """
        Raises:
            ValueError: where batched has nothing to work with.
        """
        chosen = self._chosen
        placement = chosen.settings.get("placement") if chosen is not None else self.zo_optimizer.placement
        if placement != "forward":
            raise ValueError(
                "batched is given, and only placement='forward' shows each row of a batch the weights of its own "
                f"direction; zo has {placement!r}. Give it, for example zo={{'method': 'es', 'placement': 'forward', "
                "'distribution': 'lowrank:1'}, or leave batched out"
            )

    def begin_books(self) -> None:
        super().begin_books()
        self._seen.clear()

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        made = super().create_optimizer(model)
        optimizer = self.zo_optimizer
        if self.writer.samples and optimizer.paired_randomness == "auto":
            optimizer.paired_randomness = not self.batched  # rows of one generate() draw their own
        return made

    def _prepare_inputs(self, inputs: Any) -> Any:
        made = super()._prepare_inputs(inputs)
        lacking = [name for name in ("input_ids", "attention_mask", "rows") if name not in made]
        if lacking:
            raise ValueError(
                f"data_collator gives no {', '.join(map(repr, lacking))}; give one that has the prompts' tokens and mask, "
                'padded on the left, and as "rows" the dataset\'s rows, or leave it out'
            )
        return {**made, "rows": Examples(made["rows"])}  # also those of another collator

    def set_mode(self, model: nn.Module) -> None:
        """Completions are written as they will be in use: without dropout."""
        model.eval()

    def training_step(self, *args: Any, **named: Any) -> Tensor:
        reward: Tensor = super().training_step(*args, **named)
        self.notes.tell()
        return reward

    def probe(self, model: nn.Module, batch: Any, num_items_in_batch: Any) -> dict[str, Any]:
        testing = self.zo_optimizer.testing_rows  # of directions that are not the step's
        with self.notes.silent() if testing else contextlib.nullcontext():
            blocks = self.judge(model, batch, defaultdict(list) if testing else self._seen)
        if not self.batched:
            return means(blocks[0])
        return {name: [one for block in blocks for one in block[name]] for name in self.rewards.functions}

    def judge(
        self, model: nn.Module, batch: Mapping[str, Any], kept: dict[str, list[float]]
    ) -> list[dict[str, list[float]]]:
        """The rewards of the model's completions of a batch, for each of the blocks that it has been repeated in. kept:
        takes what there is to log."""
        completions, ids = self.writer.write(model, batch)
        rows = batch["rows"]
        size, found = len(rows) // rows.blocks, []
        for start in range(0, len(rows), size):  # functions that compare what they get see one probe's at a time
            own = slice(start, start + size)
            each = self.rewards.each(
                prompts=[row["prompt"] for row in rows[own]], completions=completions[own], completion_ids=ids[own],
                trainer_state=self.state, log_metric=lambda name, value: kept[name].append(float(value)),
                log_extra=no_table, **columns(rows[own]),
            )  # fmt: skip
            rewards = means(each)
            for name, value in rewards.items():
                kept[f"rewards/{name}"].append(value)
            kept["reward"].append(self._total(rewards))
            kept["completion_length"].append(mean([float(len(one)) for one in ids[own]]))
            kept["empty_completions"].append(mean([float(not one) for one in ids[own]]))
            found.append(each)
        return found

    def _total(self, rewards: Mapping[str, float]) -> float:
        return sum(self.rewards.weights.get(name, 1.0) * value for name, value in rewards.items())

    def step_options(self, batches: list[Any], num_items_in_batch: Any) -> dict[str, Any]:
        weights = [len(batch["rows"]) for batch in batches]
        return {"batch_weights": weights, "loss_weights": self.rewards.weights, "batched": self.batched}

    def tell(self, logs: dict[str, float]) -> None:
        super().tell(logs)
        logs.update((name, mean(values)) for name, values in self.of_all_ranks(dict(self._seen)).items())
        self._seen.clear()
        optimizer = self.zo_optimizer
        if self.batched:
            logs["probes_per_forward"] = float(optimizer.metrics["probes_per_forward"])
        steps, flat = optimizer.counters["steps"], optimizer.flat_steps
        if steps == flat >= IN_A_ROW:
            self.notes.add(
                "flat",
                f"in each of the first {steps} steps, all completions had the same reward: nothing is learnt. Take a "
                "larger eps, prompts or rewards that differ more, or sample: generation={'do_sample': True}",
            )
            self.notes.tell()

    # --------------------------------------------------------------------------------------------------------- evaluation

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(self.without_repeats(inputs))
        if not inputs["rows"]:
            return torch.zeros((), device=self.args.device), None, None
        with torch.no_grad(), self.compute_loss_context_manager():
            reward = self._total(means(self.judge(model, inputs, self._held)[0]))
        self._sizes.append(float(len(inputs["rows"])))
        return torch.tensor(-reward, device=self.args.device), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._held.clear()
        self._sizes.clear()
        out = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self.notes.tell()
        held = self.of_all_ranks({**self._held, _SIZES: self._sizes})
        sizes = torch.tensor(held.pop(_SIZES), dtype=torch.float64)
        for name, values in held.items():
            each = torch.tensor(values, dtype=torch.float64)
            own = sizes if len(each) == len(sizes) else torch.ones_like(each)  # a function's own, not one a batch
            out.metrics[f"{metric_key_prefix}_{name}"] = float((each * own).sum() / own.sum())
        return out

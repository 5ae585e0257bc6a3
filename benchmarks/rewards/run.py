"""A language model of 135 million parameters learns to write sentences of an exact form, from rewards alone.

    python -m benchmarks.rewards.run                     # all of it: an hour on two cores
    python -m benchmarks.rewards.run --methods es        # a part
    python -m benchmarks.pages docs/trl.md                                        # its text, table and picture anew

Evolution strategies and FZOO by zokern.integrations.trl.RewardTrainer: greedy answers, all weights, directions of rank 1,
all directions of a step in one generate(). Each lr of a grid is tried with seed 3 for --trial steps, and the one with the
highest reward on prompts of its own is taken; then a run for each of three seeds, looked at on prompts held out. At last a
step is timed against the same with a generate() for each direction. Each is stored as it ends, in
benchmarks/results/rewards-<device>.json, and not done again.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import zokern
from benchmarks import study
from benchmarks.llm.bench import SEARCH_SEED
from benchmarks.llm.methods import SEEDS
from benchmarks.llm.protocol import former
from benchmarks.llm.search import best, next_lr
from benchmarks.lowrank import populations
from benchmarks.rewards import objective
from zokern.bench.record import RESULTS, machine, store
from zokern.finetune import models
from zokern.finetune.options import Options
from zokern.integrations.rewards import Rewards, columns

FORWARDS = 32  # a step, of one probe each
GRID = (1e-5, 3e-5, 1e-4)
METHODS: dict[str, dict[str, Any]] = {
    "es": {"num_directions": FORWARDS // 2, "antithetic": True},
    "fzoo": {"candidates": FORWARDS - 1},
}
LABELS = {"es": "ES, 16 directions both ways", "fzoo": "FZOO, 31 directions"}
LOOK = 5  # steps between looks at the prompts held out
SHOWN = 4  # of what was written
Settings = dict[str, Any]


class Subject:
    """The model, which begins each run as it is, and what it is asked."""

    def __init__(self, options: Any) -> None:
        from zokern.integrations.completions import Prompts, Writer
        from zokern.integrations.notes import Notes

        given = Options(model=options.model, objective="prompt", data="x", template="{text}")
        config = models.load_config(options.model)
        self.model, self.tokenizer = models.load(given, "prompt", [], config, torch.float32)
        self.model.to(options.device)
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.prompts = Prompts(self.tokenizer, None)
        self.writer = Writer(self.model, self.prompts.tokenizer, {"max_new_tokens": options.tokens}, Notes())
        self.options = options

    @torch.no_grad()
    def reset(self) -> None:
        for p, start in zip(self.model.parameters(), self.start, strict=True):
            p.copy_(start)

    def trainer(self, folder: str, method: str, lr: float, seed: int, steps: int, part: str) -> Any:
        from transformers import TrainingArguments

        from zokern.integrations.trl import RewardTrainer

        options = self.options
        settings = TrainingArguments(
            folder, max_steps=steps, learning_rate=lr, lr_scheduler_type="constant", logging_steps=1, report_to=[],
            per_device_train_batch_size=options.batch, per_device_eval_batch_size=8, save_strategy="no",
            eval_strategy="steps", eval_steps=LOOK, eval_on_start=True, use_cpu=options.device == "cpu", seed=seed,
            disable_tqdm=True,
        )  # fmt: skip
        low = {"placement": "forward", "distribution": "lowrank:1"}
        return RewardTrainer(
            self.model, objective.REWARDS, settings, objective.rows("train"), objective.rows(part), self.tokenizer,
            reward_weights=objective.WEIGHTS, generation={"max_new_tokens": options.tokens}, batched=True,
            zo={"method": method, "eps": options.eps, "seed": seed, **METHODS[method], **low},
        )  # fmt: skip

    def run(self, method: str, lr: float, seed: int, steps: int, part: str) -> Settings:
        self.reset()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, method, lr, seed, steps, part)
            _quiet(trainer)
            begun = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begun
            journal = (Path(folder) / "journal.zkj").stat().st_size
        looks = {line["step"]: line for line in trainer.state.log_history if "eval_reward" in line}
        each = {name: [line[f"eval_{name}"] for line in looks.values()] for name in ("reward", "rewards/exact")}
        return {
            "lr": lr, "seed": seed, "steps": steps, "seconds": seconds, "journal_bytes": journal,
            "looks": list(looks), "reward": each["reward"], "exact": each["rewards/exact"],
            "train": [line["reward"] for line in trainer.state.log_history if "reward" in line],
            "forwards": trainer.zo_optimizer.counters["forwards"],
            "together": trainer.zo_optimizer.metrics["probes_per_forward"].item(),
            "written": self.written(part),
        }  # fmt: skip

    def written(self, part: str) -> list[str]:
        """To the first prompts of a part."""
        with torch.no_grad():
            completions, _ = self.writer.write(self.model.eval(), self.batch(part, SHOWN))
        return list(map(objective.text, completions))

    def batch(self, part: str, count: int) -> dict[str, Any]:
        """The first prompts of a part, on the device."""
        batch = self.prompts(objective.rows(part)[:count])
        return {
            name: value.to(self.options.device) if isinstance(value, Tensor) else value for name, value in batch.items()
        }

    def side_by_side(self, rounds: int) -> Settings:
        """Steps of ES on the same prompts: dense in place, low rank, and all in one generate()."""
        self.reset()
        options, model = self.options, self.model.eval()
        judges, batch = Rewards(objective.REWARDS, objective.WEIGHTS), self.batch("train", options.batch)

        def rewards(batch: Mapping[str, Any]) -> Tensor:
            said, _ = self.writer.write(model, batch)
            rows = batch["rows"]
            each = judges.each([row["prompt"] for row in rows], said, **columns(rows))
            weighed = [judges.weights.get(name, 1.0) * torch.tensor(row) for name, row in each.items()]
            return torch.stack(weighed).sum(dim=0)

        def make(**settings: Any) -> Any:
            return zokern.ES(model, 1e-12, eps=options.eps, maximize=True, **METHODS["es"], **settings)

        calls = populations.candidates(make, rewards, batch, lambda batch: rewards(batch).mean())
        return populations.timed(calls, rounds, "a step")


def _quiet(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def study_all(options: Any, results: Settings, keep: Callable[[Settings], None], say: Callable[[str], None]) -> None:
    """Whatever is not there yet, each stored as it ends."""
    made: list[Subject] = []

    def subject() -> Subject:
        if not made:
            made.append(Subject(options))
        return made[0]

    def told(what: str, run: Settings) -> None:
        keep(results)
        say(f"{what}: reward {run['reward'][0]:.2f} -> {run['reward'][-1]:.2f}, of the form {run['exact'][0]:.0%} -> "
            f"{run['exact'][-1]:.0%}; {run['seconds']:.0f} s")  # fmt: skip

    methods = results.setdefault("methods", {})
    for name in options.methods:
        record = methods.setdefault(name, {"label": LABELS[name], "grid": [], "runs": []})
        while (lr := next_lr(GRID, record["grid"])) is not None:
            run = subject().run(name, lr, SEARCH_SEED, options.trial, "validation")
            record["grid"].append(
                {"lr": lr, "loss": -run["reward"][-1], "reward": run["reward"][-1], "exact": run["exact"][-1]}
            )
            told(f"{LABELS[name]}, lr {lr:g}, search", run)
        record["lr"] = best(record["grid"])
    for seed in SEEDS:
        for name in options.methods:
            record = methods[name]
            if seed in [run["seed"] for run in record["runs"]]:
                continue
            run = subject().run(name, record["lr"], seed, options.steps, "test")
            record["runs"].append(run)
            told(f"{LABELS[name]}, lr {record['lr']:g}, seed {seed}", run)
    if "before" not in results:
        subject().reset()
        results["before"] = subject().written("test")
        keep(results)
    if "side" not in results and options.rounds:
        results["side"] = subject().side_by_side(options.rounds)
        keep(results)


def main() -> None:
    parser = study.parser(
        __doc__,
        model=("smollm2", "as zokern finetune takes it: smollm2, a folder that save_pretrained wrote, or a .gguf file"),
        device=(("cpu", "cuda"), "that it runs on"), methods=(list(METHODS), f"of {', '.join(METHODS)} (default: all)"),
        steps=(30, f"of a run, of {FORWARDS} directions each"), trial=(15, "steps of a run that chooses lr"),
        batch=(2, "prompts a step"), tokens=(24, "that an answer may have"), eps=(3e-3, "radius of the perturbation"),
        rounds=(3, "of steps that are timed; 0: none"), threads=(2, "of torch"),
    )  # fmt: skip
    options = parser.parse_args()
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if min(options.steps, options.trial) < LOOK or min(options.batch, options.tokens, options.threads) < 1:
        parser.error(f"--steps and --trial are at least {LOOK}; --batch, --tokens and --threads at least 1")
    if not 0 < options.eps < math.inf or options.rounds < 0:
        parser.error("--eps is positive, --rounds not negative")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    settings = {name: getattr(options, name) for name in ("model", "steps", "trial", "batch", "tokens", "eps")}
    settings["forwards"] = FORWARDS
    path = options.output or RESULTS / f"rewards-{options.device}.json"
    results = former(path, settings, machine(device))

    def keep(found: Settings) -> None:
        methods = found["methods"]
        complete = all(len(methods.get(name, {"runs": []})["runs"]) == len(SEEDS) for name in METHODS)
        store("rewards", device, settings, found, path, complete=complete and "side" in found)

    console = Console(highlight=False)
    study_all(options, results, keep, lambda line: console.print(f"{time.strftime('%H:%M:%S')} {line}", soft_wrap=True))
    console.print(f"stored {path}; now python -m benchmarks.pages docs/trl.md")


if __name__ == "__main__":
    main()

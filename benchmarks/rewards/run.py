"""A real language model climbs a reward that rules compute: answers of about eight words that end as a sentence does.

    python -m benchmarks.rewards.run --model FOLDER        # SmolLM2-135M-Instruct as save_pretrained wrote it, or its .gguf

Evolution strategies by zokern.integrations.trl.RewardTrainer, greedy, on the scales of the model's norms alone (35 thousand
numbers) or on all weights. Stores benchmarks/results/rewards-<device>.json: the mean reward of each step, and on prompts
held out what the model wrote before and after.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import study
from benchmarks.parts import load as stored
from benchmarks.parts import table
from zokern.bench.record import store
from zokern.finetune import models
from zokern.finetune.options import Options

WORDS = 8
THINGS = (
    "a cat", "the sea", "a train", "winter", "a violin", "bread", "the moon", "a garden", "a bicycle", "rain", "a mountain",
    "a library", "coffee", "a spider", "a castle", "the sun", "a river", "a clock", "an apple", "snow", "a bridge",
    "a horse", "a lamp", "a forest", "a letter", "the wind", "a piano", "a market", "tea", "a lighthouse", "a pencil",
    "autumn",
)  # fmt: skip
HELD_OUT = 8
Messages = list[dict[str, str]]


def brief(completions: list[Messages], **_: Any) -> list[float]:
    """1 for eight words, 0 for none or for sixteen."""
    return [1.0 - min(abs(len(said.split()) - WORDS) / WORDS, 1.0) for said in map(_text, completions)]


def finished(completions: list[Messages], **_: Any) -> list[float]:
    """Whether it ends as a sentence does."""
    return [float(said.rstrip()[-1:] in tuple(".!?")) for said in map(_text, completions)]


def _text(completion: Messages) -> str:
    return completion[0]["content"]


def prompts() -> list[dict[str, Messages]]:
    return [{"prompt": [{"role": "user", "content": f"Write one sentence about {thing}."}]} for thing in THINGS]


def measure(model: Any, tokenizer: Any, args: Any) -> dict[str, Any]:
    """One run: its course, and answers to the prompts held out."""
    from transformers import TrainingArguments

    from zokern.integrations.trl import RewardTrainer

    if args.trained == "norms":
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)
    rows = prompts()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, learning_rate=args.lr, lr_scheduler_type="constant", logging_steps=1,
            per_device_train_batch_size=args.batch, per_device_eval_batch_size=HELD_OUT, save_strategy="no", report_to=[],
            use_cpu=args.device == "cpu", seed=args.seed,
        )  # fmt: skip
        zo = {"method": "es", "num_directions": args.directions, "antithetic": True, "eps": args.eps, "seed": args.seed}
        trainer = RewardTrainer(
            model, [brief, finished], settings, rows[:-HELD_OUT], rows[-HELD_OUT:], tokenizer, zo=zo,
            generation={"max_new_tokens": args.tokens},
        )  # fmt: skip

        def look() -> dict[str, Any]:
            found = trainer.evaluate()
            written, _ = trainer.writer.write(model.eval(), trainer.data_collator(rows[-HELD_OUT:]))
            return {"reward": found["eval_reward"], "brief": found["eval_rewards/brief"],
                    "finished": found["eval_rewards/finished"], "written": list(map(_text, written))}  # fmt: skip

        before, begun = look(), time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        return {
            "before": before, "after": look(), "seconds": seconds,
            "rewards": [line["reward"] for line in trainer.state.log_history if "reward" in line],
            "forwards": trainer.zo_optimizer.counters["forwards"],
            "journal_bytes": (Path(folder) / "journal.zkj").stat().st_size,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip


def main() -> None:
    args = study.parser(
        __doc__, model=(str, "a folder that save_pretrained wrote, or a .gguf file"), device=("cpu", "cpu or cuda"),
        trained=(("norms", "all"), "what of the model"), steps=(30, "of the run"),
        directions=(4, "of a step, each both ways"),
        batch=(8, "prompts a forward"), tokens=(24, "that an answer may have"), lr=(4e-4, "constant"),
        eps=(2e-2, "radius of the perturbation"), seed=(0, "of data and directions"), threads=(2, "of PyTorch"),
    ).parse_args()  # fmt: skip
    if args.model is None:
        raise SystemExit("--model is missing: a folder that save_pretrained wrote, or a .gguf file")
    torch.set_num_threads(args.threads)
    options = Options(model=args.model, objective="prompt", data="x", template="{text}")
    config = models.load_config(args.model)
    model, tokenizer = models.load(options, "prompt", [], config, torch.float32)
    found = measure(model.to(args.device), tokenizer, args)
    shown = Table("", "before", "after")
    for name in ("reward", "brief", "finished"):
        shown.add_row(name, f"{found['before'][name]:.2f}", f"{found['after'][name]:.2f}")
    Console().print(shown)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "model", "device", "threads")}
    print("stored in", store("rewards", torch.device(args.device), settings, found, args.output).name)


def part() -> str:
    run = stored("rewards-cpu.json")
    found, settings = run["results"], run["settings"]
    what = "the scales of its norms" if settings["trained"] == "norms" else "all its weights"
    head = (
        f"SmolLM2-135M-Instruct, asked for a sentence about a thing, rewarded for about {WORDS} words (1 for {WORDS}, 0 "
        f"for none or {2 * WORDS}) and for an end as a sentence has it (1): evolution strategies on {what} "
        f"({found['trained']:,} numbers), {settings['steps']} steps of {2 * settings['directions']} forwards over "
        f"{settings['batch']} prompts, greedy, in {found['seconds'] / 60:.0f} minutes on {run['machine']['threads']} "
        f"cores. On {HELD_OUT} prompts held out the reward goes from **{found['before']['reward']:.2f} to "
        f"{found['after']['reward']:.2f}** (of 2), and the run's journal has {found['journal_bytes'] / 1000:.1f} kB. "
        f"`python -m benchmarks.rewards.run`"
    )
    rows = [
        [f"{thing}", f"{_cell(before)}", f"{_cell(after)}"]
        for thing, before, after in zip(
            THINGS[-HELD_OUT:], found["before"]["written"], found["after"]["written"], strict=True
        )
    ][:4]
    return f"{head}\n\n{table(['about', 'before', 'after'], rows)}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


PAGES = {"docs/trl.md": {"rewards": part}}

if __name__ == "__main__":
    main()

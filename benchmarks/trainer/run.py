"""Times a step inside transformers' Trainer against the same step in a plain loop, in turn in one run.

    python -m benchmarks.trainer.run                       # CPU, a GPT-2 of three blocks, 8 x 32 tokens

Both have the same model, batches, MeZO and linear schedule; each starts from nothing, and starting counts. The Trainer has
its own defaults, logs every 10 steps and, with "journal", writes zokern's. Stores benchmarks/results/trainer-<device>.json:
seconds of this process on its processors, which other programs on the machine do not lengthen as they do the clock's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import zokern
from benchmarks import study
from benchmarks.parts import load
from zokern.bench.record import store

TOKENS, BATCH, VOCABULARY = 32, 8, 1000
Rows = list[dict[str, torch.Tensor]]


def build(width: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=width,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=1,
        **still,
    )
    return GPT2LMHeadModel(config)


def rows(count: int = 512) -> Rows:
    tokens = torch.randint(VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def loop(model: Any, data: Rows, steps: int) -> None:
    optimizer = zokern.MeZO(model.train(), lr=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    done = 0
    while done < steps:
        for batch in torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True):
            optimizer.step(lambda b=batch: model(**b).loss)
            schedule.step()
            done += 1
            if done == steps:
                break


def trainer(model: Any, data: Rows, steps: int, *, journal: bool) -> None:
    from transformers import TrainingArguments

    from zokern.integrations.transformers import ZOTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-6, logging_steps=10,
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        run = ZOTrainer(model, args, train_dataset=data, journal=journal)
        run.remove_callback(next(one for one in run.callback_handler.callbacks if "Printer" in type(one).__name__))
        run.train()


def measure(width: int, steps: int, rounds: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Seconds a step of each way, a number for each round."""
    data = rows()
    ways: dict[str, Callable[[Any], None]] = {
        "loop": lambda model: loop(model, data, steps),
        "trainer": lambda model: trainer(model, data, steps, journal=False),
        "journal": lambda model: trainer(model, data, steps, journal=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # what is imported and filled once
        way(build(width))
    for number in range(rounds):
        for name, way in ways.items():
            model = build(width)
            before = time.process_time()
            way(model)
            taken[name].append((time.process_time() - before) / steps)
        progress(number + 1)
    plain = statistics.median(taken["loop"])
    ratios = {name: statistics.median(taken[name]) / plain for name in ("trainer", "journal")}
    return {"seconds": taken, "over_loop": ratios}


def main() -> None:
    args = study.parser(
        __doc__, width=(128, "of the model"), steps=(400, "of a run"), rounds=(7, "runs of each way"),
        threads=(1, "of PyTorch"),
    ).parse_args()  # fmt: skip
    torch.set_num_threads(args.threads)
    console = Console()
    with console.status("warming up") as status:
        found = measure(args.width, args.steps, args.rounds, lambda n: status.update(f"{n} of {args.rounds} rounds"))
    shown = Table("way", "ms a step", "over the loop")
    for name, each in found["seconds"].items():
        shown.add_row(name, f"{1e3 * statistics.median(each):.2f}", f"{found['over_loop'].get(name, 1.0):.3f}")
    console.print(shown)
    settings = {name: getattr(args, name) for name in ("width", "steps", "rounds")}
    print("stored in", store("trainer", torch.device("cpu"), settings, found, args.output).name)


def part() -> str:
    run = load("trainer-cpu.json")
    ratio, settings = run["results"]["over_loop"], run["settings"]
    return (
        f"Measured with `python -m benchmarks.trainer.run` on a GPT-2 of three blocks, {BATCH} x {TOKENS} tokens, "
        f"{settings['steps']} steps, starting included: a step in the Trainer takes **{ratio['trainer']:.2f}** times that "
        f"of a plain loop, {ratio['journal']:.2f} times with the journal."
    )


PAGES = {"docs/trainer.md": {"overhead": part}}

if __name__ == "__main__":
    main()

"""Times steps with many directions, all in one forward, against one forward for each.

    python -m benchmarks.lowrank.populations                    # the demo's model; then generation, with SmolLM2's shape
    python -m benchmarks.lowrank.populations --shapes 1x8 --directions 8 --rounds 5 --tokens 4

Candidates take turns in one run on one model: steps of ES and FZOO along dense directions in place, along low-rank ones
with a forward for each, and with all of them in one forward. The second part is ES whose rewards are of what the model has
written: a model of the shape of SmolLM2-135M with random weights, one prompt. Told are medians over the rounds. Stores
benchmarks/results/lowrank-populations-cpu.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import zokern
from benchmarks import study
from benchmarks.parts import load, made_on, table
from zokern.bench import models
from zokern.bench.record import store

CPU = torch.device("cpu")
SHAPES = ["2x16", "1x8"]
LR, EPS = 1e-7, 1e-3
PROMPT = 8  # tokens
DENSE, ALONE, TOGETHER = "dense, inplace", "low rank, forward", "low rank, all in one forward"
Calls = dict[str, Callable[[], object]]
Closure = Callable[[Mapping[str, Tensor]], Tensor]


def candidates(
    make: Callable[..., Any], closure: Closure, batch: dict[str, Tensor], mean: Closure | None = None
) -> Calls:
    """make: an optimizer with these settings. closure: losses or rewards of each row. mean: of the batch, for steps with
    a forward for each direction."""
    low = {"placement": "forward", "distribution": zokern.LowRank(1)}
    dense, alone, together = make(placement="inplace"), make(**low), make(**low)
    one = closure if mean is None else mean
    return {
        DENSE: lambda: dense.step(one, [batch]),
        ALONE: lambda: alone.step(one, [batch]),
        TOGETHER: lambda: together.step(closure, [batch], batched=True),
    }


def timed(calls: Calls, rounds: int, name: str) -> dict[str, dict[str, float]]:
    """{candidate: seconds, and how many times faster than dense in the same round: medians}."""
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for number in track(range(-1, rounds), description=name, transient=True):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 0:  # the first warms up, and tests the order of rows
                seconds[label].append(time.perf_counter() - start)
    return {
        label: {
            "seconds": statistics.median(own),
            "faster_than_dense": statistics.median(a / b for a, b in zip(seconds[DENSE], own, strict=True)),
        }
        for label, own in seconds.items()
    }


def of_losses(name: str, method: str, shape: str, directions: int) -> Calls:
    model = models.build(name, torch.float32, CPU)
    work = models.closure(name, model, *map(int, shape.split("x")), CPU)
    count = {"num_directions": directions} if method == "ES" else {"candidates": directions}
    return candidates(
        lambda **settings: getattr(zokern, method)(model, LR, eps=EPS, **count, **settings),
        work.each,
        work.batch,
        work.loss,
    )


def of_rewards(directions: int, tokens: int) -> Calls:
    """The share of distinct tokens in what is written, of `tokens` each."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with models.making(torch.float32, CPU, 0):
        model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(1, config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def rewards(batch: Mapping[str, Tensor]) -> Tensor:
        mask = torch.ones_like(batch["input_ids"])
        written = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
        )[:, PROMPT:]
        return torch.tensor([len(set(row)) / tokens for row in written.tolist()], dtype=torch.float32)

    return candidates(
        lambda **settings: zokern.ES(model, LR, eps=1e-2, num_directions=directions, maximize=True, **settings),
        rewards,
        {"input_ids": prompt},
        lambda batch: rewards(batch).mean(),
    )


def main() -> None:
    parser = study.parser(
        __doc__, model=("demo", f"one of {', '.join(models.MODELS)}"), shapes=(SHAPES, "rows x tokens of a batch"),
        directions=(16, "of a step"), rounds=(9, "timed"), threads=(2, "of torch"), tokens=(16, "that are written"),
    )  # fmt: skip
    args = parser.parse_args()
    if args.model not in models.MODELS:
        parser.error(f"--model is {args.model!r}; it takes {', '.join(models.MODELS)}")
    for option in ("directions", "rounds", "threads", "tokens"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1")
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for method in ("ES", "FZOO"):
        for shape in args.shapes:
            name = f"{method}, {shape.replace('x', ' x ')} tokens"
            results[name] = timed(of_losses(args.model, method, shape, args.directions), args.rounds, name)
    name = f"ES, rewards of {args.tokens} written tokens"
    results[name] = timed(of_rewards(args.directions, args.tokens), max(1, args.rounds // 3), name)
    Console().print(_rows(results), highlight=False)
    named = {name: getattr(args, name) for name in ("model", "directions", "rounds", "tokens")}
    settings = {**named, "lr": LR, "eps": EPS}
    print("stored in", store("lowrank-populations", CPU, settings, results, args.output).name)


def _rows(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    rows = [
        [name, *(f"{found[label]['faster_than_dense']:.2f}" for label in (ALONE, TOGETHER))]
        for name, found in results.items()
    ]
    return table(["times faster than dense, in place", ALONE, TOGETHER], rows)


def populations_part() -> str:
    run = load("lowrank-populations-cpu.json")
    head = f"{made_on(run)}; float32, rank 1, {run['settings']['directions']} directions a step, medians."
    return f"{head}\n\n{_rows(run['results'])}"


PAGES = {"docs/lowrank.md": {"populations": populations_part}}

if __name__ == "__main__":
    main()

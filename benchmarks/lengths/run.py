"""Times a step on sentences of their own lengths: packed rows, padded rows, and the published order of work.

    python -m benchmarks.lengths.run                       # CPU, SmolLM2-135M's shape, 16 sentences a batch

The prompt objective of `zokern finetune`, on the embedded sentences. The model is made from a configuration, with random
weights; the tokens are the demo's. "packed" and "padded" are zokern.MeZO with --packing always and never; "published" moves
the weights in four sweeps of torch.normal, and makes logits at every token of rows padded to the longest. Ways take turns.
Stores benchmarks/results/lengths-cpu.json: seconds of this process on its processors, which other programs do not lengthen
as they do the clock's.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import zokern
from benchmarks import study
from benchmarks.parts import load
from zokern.bench.record import store
from zokern.bench.step_peers import Published
from zokern.finetune import models
from zokern.finetune.batches import Batch, Group, Order, cut
from zokern.finetune.data import TextSet
from zokern.finetune.embedded import docstrings
from zokern.finetune.prompts import Prompt

LONGEST, LABELS, VOCABULARY = 64, ["files", "text"], 49152  # SmolLM2's
CASES = {"one token": ["files", "text"], "several tokens": ["files and folders", "text"]}
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
WAYS = ("packed", "padded", "published")


def build(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE)
    return LlamaForCausalLM(config).eval()


@functools.cache
def texts() -> TextSet:
    """The embedded sentences."""
    found = [sentence for sentence, _ in docstrings.sentences()][:512]
    return TextSet(found, [i % 2 for i in range(len(found))])


def task_of(model: nn.Module, words: list[str]) -> Prompt:
    """The objective, with rows padded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.locate("demo"))
    tokenizer.eos_token = tokenizer.sep_token  # a prompt goes on without it
    task = Prompt(model, tokenizer, LABELS, LONGEST, "{text} Topic:", words)
    task.add("train", texts())
    return task


def published_loss(task: Prompt, batch: Batch) -> Tensor:
    """The loss of a batch, from all logits of rows padded to the longest."""
    (group,) = batch.groups
    assert isinstance(group, Group)
    logits = task.model(input_ids=group.ids, attention_mask=group.mask).logits.float()
    if task.single:
        ends = logits[torch.arange(len(logits)), group.lengths - 1]
        return F.cross_entropy(batch.gather([ends[:, [word[0] for word in task.words]]]), batch.targets)
    counts = torch.tensor([len(word) for word in task.words])[group.rows % len(task.words)]
    spoken = F.log_softmax(logits[:, :-1], -1).gather(2, group.ids[:, 1:, None]).squeeze(2)
    position = torch.arange(1, group.ids.shape[1])
    inside = (position >= (group.lengths - counts)[:, None]) & (position < group.lengths[:, None])
    scores = torch.where(inside, spoken, 0.0).sum(1) / counts
    return F.cross_entropy(batch.gather([scores]).view(-1, len(task.words)), batch.targets)


def padded_together(task: Prompt, wanted: list[int]) -> Batch:
    """A batch in one group, as long as its longest row."""
    rows, targets = task.sets["train"]
    each = 1 if task.single else len(task.words)
    flat = [i * each + c for i in wanted for c in range(each)]
    return cut(rows, flat, [targets[i] for i in wanted], whole=True)


@torch.no_grad()
def measure(model: nn.Module, words: list[str], batch: int, rounds: int, told: Callable[[int], None]) -> dict[str, Any]:
    """Seconds a step of each way, a number for each round, and the losses of the first batch by each way."""
    padded, packed = task_of(model, words), task_of(model, words)
    packed.pack()
    ours, peer = zokern.MeZO(model, 1e-6), Published(model, 1e-6)
    order = Order(len(padded.sets["train"][1]), 0)
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, float] = {}
    for number in range(rounds + 1):  # the first warms up
        wanted = order.draw(batch)
        together = padded_together(padded, wanted)
        losses = losses or {
            "packed": packed.loss(packed.batch("train", wanted)).item(),
            "padded": padded.loss(padded.batch("train", wanted)).item(),
            "published": published_loss(padded, together).item(),
        }
        steps: dict[str, Callable[[], object]] = {
            "packed": lambda: ours.step(packed.loss, [packed.batch("train", wanted)]),  # noqa: B023
            "padded": lambda: ours.step(padded.loss, [padded.batch("train", wanted)]),  # noqa: B023
            "published": lambda: peer.step(lambda: published_loss(padded, together)),  # noqa: B023
        }
        for name, step in steps.items():
            before = time.process_time()
            step()
            if number:
                taken[name].append(time.process_time() - before)
        told(number)
    ratios = {
        name: statistics.median(a / b for a, b in zip(taken[name], taken["packed"], strict=True)) for name in WAYS
    }
    return {"seconds": taken, "over_packed": ratios, "losses": losses}


def main() -> None:
    args = study.parser(
        __doc__, layers=(30, "of the model"), batch=(16, "sentences"), rounds=(7, "steps of each way"),
        threads=(1, "of PyTorch"),
    ).parse_args()  # fmt: skip
    torch.set_num_threads(args.threads)
    model, console, found = build(args.layers), Console(), {}
    shown = Table("label words", "way", "s a step", "over packed")
    with console.status("warming up") as status:
        for case, words in CASES.items():
            found[case] = measure(
                model, words, args.batch, args.rounds, lambda n, c=case: status.update(f"{c}: {n} done")
            )
            for name, each in found[case]["seconds"].items():
                ratio = found[case]["over_packed"][name]
                shown.add_row(case, name, f"{statistics.median(each):.3f}", f"{ratio:.2f}")
    console.print(shown)
    settings = {name: getattr(args, name) for name in ("layers", "batch", "rounds", "threads")}
    print("stored in", store("lengths", torch.device("cpu"), settings, found, args.output).name)


def part() -> str:
    run = load("lengths-cpu.json")
    settings, machine = run["settings"], run["machine"]
    told = [
        f"{case} in a label's word, **{found['over_packed']['padded']:.1f}** times with padded rows and "
        f"**{found['over_packed']['published']:.1f}** times in the published order of work"
        for case, found in run["results"].items()
    ]
    return (
        f"Measured with `python -m benchmarks.lengths.run` on {settings['threads']} thread of an {machine['processor']}, "
        f"{settings['batch']} sentences a batch of the embedded data, a model of SmolLM2-135M's shape (medians of "
        f"{settings['rounds']} rounds). A step of MeZO takes, over one with packed rows: {'; '.join(told)} (MeZO's four "
        "sweeps of `torch.normal`, logits at every token)."
    )


PAGES = {"docs/finetune.md": {"lengths": part}}

if __name__ == "__main__":
    main()

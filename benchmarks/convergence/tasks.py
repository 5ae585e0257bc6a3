"""The two tasks of run.py: a model, training batches, and held-out texts in two parts.

`validation` chooses settings, `report` is what is told of; `curve` is a fixed piece of `report`, small enough to be
looked at twenty times in a run. Both tasks need nothing but the Python standard library's own sources and the packages of
`pip install "zokern[demo]"`.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from zokern.finetune import data as texts
from zokern.finetune import models
from zokern.finetune.batches import Order
from zokern.finetune.options import Options
from zokern.finetune.similar import Similarity
from zokern.finetune.tasks import evaluate


class Task:
    """A model in eval mode, at its starting weights after reset(), and what a task of ours says of it:

    batches(size, seed): endless training batches, the same for every method with the same seed.
    loss(batch): their mean loss, which the methods' closures return.
    evaluate(part): loss, and accuracy where there is one, on `validation`, `report` or `curve`.
    describe(): sizes, for the record.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._start = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def reset(self) -> None:
        for p, start in zip(self.model.parameters(), self._start, strict=True):
            p.copy_(start)
            p.grad = None

    @torch.no_grad()
    def moved(self) -> float:
        """Root mean square change of the trainable parameters' elements since reset()."""
        pairs = [(p, s) for p, s in zip(self.model.parameters(), self._start, strict=True) if p.requires_grad]
        total = sum((p.double() - s.double()).square().sum().item() for p, s in pairs)
        return (total / sum(p.numel() for p, _ in pairs)) ** 0.5


def similarity(dtype: torch.dtype) -> tuple[Similarity, Any]:
    """The model and the loss of `zokern finetune` without options, and its data, of which the task has none yet."""
    options = Options()
    data = texts.load(options)
    config = models.load_config(options.model)
    model, tokenizer = models.load(options, "similarity", data.labels, config, dtype)
    sentences = [data.descriptions[label] for label in data.labels]
    return Similarity(model, tokenizer, data.labels, options.max_length, sentences, options.temperature), data


class Demo(Task):
    """What `zokern finetune` without options does."""

    def __init__(self) -> None:
        self._task, data = similarity(torch.float32)
        # Sorted by label and, as the sort is stable, by a hash of the text within: each part has each label's share.
        held = sorted(range(len(data.eval)), key=data.eval.targets.__getitem__)
        chosen = {"validation": held[::2], "report": held[1::2], "curve": held[1::8]}
        for part, indices in chosen.items():
            pick = texts.TextSet([data.eval.texts[i] for i in indices], [data.eval.targets[i] for i in indices])
            self._task.add(part, pick)
        self._task.add("train", data.train)
        self._sizes = {part: len(indices) for part, indices in chosen.items()} | {"train": len(data.train)}
        super().__init__(self._task.model)

    def batches(self, size: int, seed: int) -> Iterator[Any]:
        order = Order(self._sizes["train"], seed)
        while True:
            yield self._task.batch("train", order.draw(size))

    def loss(self, batch: Any) -> Tensor:
        return self._task.loss(batch)

    def evaluate(self, part: str) -> dict[str, float]:
        accuracy, loss = evaluate(self._task, part, 100)
        return {"loss": loss, "accuracy": accuracy}

    def describe(self) -> dict[str, Any]:
        return {
            "what": "all-MiniLM-L6-v2 on docstrings of the Python standard library, as `zokern finetune`",
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "texts": self._sizes,
        }


# ------------------------------------------------------------------------------------------------ the language model

VOCABULARY = 128  # ASCII; anything else becomes "?"
CONTEXT = 64
PROSE = re.compile(r"[A-Za-z0-9 ,.;!?'\n-]+")  # paragraphs without a sign of code: the styles are to differ
MAX_CHARACTERS = 30_000  # of one file, so that none outweighs the others
SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"}


def _trees() -> Iterator[ast.Module]:
    """The standard library's sources, in an order that has nothing to do with their names."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts)]
    for path in sorted(paths, key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest()):
        try:
            yield ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates, and sources of other versions


def _documented(tree: ast.Module) -> Iterator[Any]:
    """What may have a docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def corpora(held_files: int = 24, train_characters: int = 1_500_000) -> dict[str, Tensor]:
    """Characters of `prose` (in docstrings), and of code in `train`, `validation` and `report`: no file in two of these."""
    prose: list[str] = []
    code: list[str] = []
    wanted = train_characters
    for tree in _trees():
        for node in _documented(tree):
            paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
            prose += [p for p in paragraphs if PROSE.fullmatch(p) and len(p.split()) >= 4]
        if wanted > 0:
            for node in _documented(tree):
                if ast.get_docstring(node):
                    node.body = node.body[1:] or [ast.Pass()]
            source = ast.unparse(tree)  # no comments either: code and nothing else
            if len(source) > 2000:  # a file of a few lines has no style
                code.append(source[:MAX_CHARACTERS])
                wanted -= len(code[-1]) if len(code) > held_files else 0
    held, train = code[:held_files], code[held_files:]
    parts = {"prose": prose, "train": train, "validation": held[::2], "report": held[1::2]}
    whole = {name: bytearray("\n\n".join(part).encode("ascii", "replace")) for name, part in parts.items()}
    return {name: torch.frombuffer(text, dtype=torch.uint8) for name, text in whole.items()}


class LanguageModel(Task):
    """A small LLaMA over characters that has read the prose of docstrings, and is now to write code."""

    HELD_WINDOWS, CURVE_WINDOWS = 256, 96

    def __init__(self, cache: Path, pretrain_steps: int = 1000, *, redo: bool = False) -> None:
        transformers = models.import_transformers()
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True, use_cache=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self._text = corpora()
        self._held = {part: self._windows(part) for part in ("validation", "report")}
        self._held["curve"] = self._held["report"][: self.CURVE_WINDOWS]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = transformers.LlamaForCausalLM(config).eval()
        digest = hashlib.sha256(self._text["prose"].numpy().tobytes()).hexdigest()[:12]
        path = cache / f"lm-{digest}-{pretrain_steps}.pt"
        if redo or not path.is_file():
            self._pretrain(pretrain_steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), path)
        self.model.load_state_dict(torch.load(path, weights_only=True))
        self._pretrain_steps = pretrain_steps
        super().__init__(self.model)

    def _windows(self, part: str) -> Tensor:
        text = self._text[part]
        starts = torch.linspace(0, len(text) - CONTEXT - 1, self.HELD_WINDOWS).long()
        # A stride prime to the count spreads the first few windows, the curve's, over all files.
        return torch.stack([text[s : s + CONTEXT + 1] for s in starts])[(torch.arange(len(starts)) * 37) % len(starts)]

    def _draw(self, text: str, size: int, generator: torch.Generator) -> Tensor:
        source = self._text[text]
        starts = torch.randint(len(source) - CONTEXT, (size,), generator=generator).tolist()
        return torch.stack([source[s : s + CONTEXT + 1] for s in starts])

    def _pretrain(self, steps: int) -> None:
        """Backpropagation on the docstrings, one cosine of Adam; about two minutes on one core."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=4e-3, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
        generator = torch.Generator().manual_seed(0)
        with Progress(transient=True) as progress:
            for _ in progress.track(range(steps), description="pre-training the language model"):
                loss = self.loss(self._draw("prose", 32, generator))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._draw("train", size, generator)

    def loss(self, batch: Tensor) -> Tensor:
        batch = batch.long()
        logits = self.model(input_ids=batch[:, :-1]).logits
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))

    @torch.no_grad()
    def evaluate(self, part: str) -> dict[str, float]:
        pieces = self._held[part].split(32)
        return {"loss": sum(self.loss(piece).item() * len(piece) for piece in pieces) / len(self._held[part])}

    def describe(self) -> dict[str, Any]:
        return {
            "what": "a LLaMA over characters: pre-trained on the Python standard library's docstrings, tuned on its code",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "blocks": self.model.config.num_hidden_layers,
            "width": self.model.config.hidden_size,
            "characters": {name: len(text) for name, text in self._text.items()},
            "context": CONTEXT,
            "held_windows": {part: len(windows) for part, windows in self._held.items()},
            "pretrain_steps": self._pretrain_steps,
        }

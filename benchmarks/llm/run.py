"""On a GPU, a real language model learns to tell good film reviews from bad ones, with forwards alone. (On a CPU:
protocol.py, with all methods and short runs.)

    python -m benchmarks.llm.run                  # SmolLM2-135M as save_pretrained wrote it, or its .gguf
    python -m benchmarks.llm.run --methods mezo --budget 2000 --trial 400       # a look
    python -m benchmarks.pages docs/llm.md                       # its tables and pictures anew

Every method may spend --budget forwards on training, with a constant lr. lr is the one of the method's grid with the lowest
loss on the validation set after --trial forwards of seed 0; accuracy is that of the test set. LoRA trained by Adam with
backpropagation is drawn for reference and pays 3 forwards for a forward and a backward. A step is one CUDA graph
where the method can be captured.

What is finished is kept in the output at once, and a benchmark that was broken off goes on there. With --seconds it ends in
time: the run under way is kept as far as it came, marked as cut, and done again by the next call.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import zokern
from benchmarks import study
from benchmarks.convergence.methods import BACKPROPAGATION, Settings, adam, lezo
from benchmarks.llm import reviews
from benchmarks.llm.methods import EPS, SEEDS
from benchmarks.llm.task import LONGEST, Batch, Sentiment, load
from zokern.bench.record import RESULTS, store

BATCH = 16
LOOKS = 12  # at the test set, in a run
LOOK_AT_CLOCK = 200  # steps; the GPU is waited for
ENDING = 5.0  # seconds kept for storing


@dataclass
class Method:
    """A way to build an optimizer. grid: of lr. seeds: how many. captured: its steps can be a CUDA graph."""

    label: str
    build: Callable[..., Any]
    forwards: int
    grid: tuple[float, ...]
    seeds: int = 1
    settings: Settings = field(default_factory=dict)
    captured: bool = True
    share: float = 1.0  # of the budget; backpropagation is done long before


METHODS = {
    "mezo": Method("MeZO", zokern.MeZO, 2, (1e-6, 3e-6, 1e-5, 3e-5), 3),
    "mezo-onesided": Method(
        "MeZO, one-sided, n=4", zokern.MeZO, 5, (3e-6, 1e-5, 3e-5, 1e-4), 3, {"num_samples": 4, "one_sided": True}
    ),
    "fzoo": Method("FZOO", zokern.FZOO, 9, (3e-7, 1e-6, 3e-6, 1e-5)),
    "hizoo": Method("HiZOO", zokern.HiZOO, 3, (1e-6, 3e-6, 1e-5, 3e-5)),
    "lezo": Method("LeZO", lezo, 2, (3e-6, 1e-5, 3e-5, 1e-4), 1, {"share": 0.75}, captured=False),
    "mezo-lowrank": Method(
        "MeZO, directions of rank 1", zokern.MeZO, 2, (1e-6, 3e-6, 1e-5, 3e-5), 1, {"distribution": "lowrank:1"}
    ),
    "lora-adam": Method(
        "LoRA, Adam (backpropagation)", adam, BACKPROPAGATION, (1e-4, 3e-4, 1e-3), captured=False, share=0.2
    ),
}  # fmt: skip


class OutOfTime(Exception):
    """--seconds are over."""


class Bench:
    """All runs over one task. results: {method: record}, stored anew after each piece."""

    def __init__(self, task: Sentiment, keep: Callable[[Settings], None], options: Any, results: Settings) -> None:
        self.task, self.keep, self.options, self.results = task, keep, options, results
        self.console, self.begun = Console(highlight=False, soft_wrap=True), time.perf_counter()
        self.lora: Sentiment | None = None

    def left(self) -> float:
        """Seconds."""
        limit = self.options.seconds or math.inf
        return limit - ENDING - (time.perf_counter() - self.begun)

    def all(self) -> None:
        for name in self.options.methods:
            method = METHODS[name]
            record = self.results.setdefault(
                name,
                {"label": method.label, "forwards_per_step": method.forwards, "settings": method.settings,
                 "graph": self._captures(method), "grid": [], "runs": []},
            )  # fmt: skip
            record["runs"] = [run for run in record["runs"] if not run["cut"]]  # those are done again, whole
            self._grid(method, record)
            record["lr"] = min((point["loss"], point["lr"]) for point in record["grid"] if point["loss"] is not None)[1]
            for seed in SEEDS[: method.seeds]:
                if seed not in [run["seed"] for run in record["runs"]]:
                    run = self._train(method, record["lr"], seed, self.options.budget, LOOKS)
                    record["runs"].append(run)
                    self._store(f"{name}, seed {seed}", run)
                    if run["cut"]:
                        raise OutOfTime

    def _grid(self, method: Method, record: Settings) -> None:
        """Tries what is left of the grid."""
        tried = [point["lr"] for point in record["grid"]]
        for lr in method.grid:
            if lr in tried:
                continue
            run = self._train(method, lr, SEEDS[0], self.options.trial, 0)
            if run["cut"]:
                raise OutOfTime
            shown = self._shown(method).evaluate("validation")
            loss = shown["loss"] if math.isfinite(shown["loss"]) else None  # it diverged
            record["grid"].append({"lr": lr, "loss": loss, "accuracy": shown["accuracy"]})
            self._store(f"{method.label}, lr {lr:g}", {**run, **shown})

    def _store(self, what: str, run: Settings) -> None:
        self.keep(self.results)
        end = run["curve"][-1] if run["curve"] else run
        told = f"{what}: {run['steps']} steps, {1e3 * run['seconds_per_step']:.2f} ms each"
        self.console.print(f"{told}, accuracy {end['accuracy']:.3f}, loss {end['loss']:.4f}, {self.left():.0f} s left")

    # ------------------------------------------------------------------------------------------------------- one run

    def _captures(self, method: Method) -> bool:
        return method.captured and self.task.device.type == "cuda"

    def _shown(self, method: Method) -> Sentiment:
        """The task as the method trains it: LoRA has a model of its own around a copy of the weights."""
        if method.build is not adam:
            return self.task
        if self.lora is None:
            import peft

            self.lora = copy.copy(self.task)
            config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
            with torch.random.fork_rng([self.task.device] if self.task.device.type == "cuda" else []):
                torch.manual_seed(0)
                model = peft.get_peft_model(copy.deepcopy(self.task.model), config)  # type: ignore[arg-type]
            self.lora.follow(model)
        return self.lora

    def _train(self, method: Method, lr: float, seed: int, forwards: int, looks: int) -> Settings:
        """From the starting weights. cut: it ended early, for the lack of time. bytes: of the steps beyond the weights, at
        the peak."""
        task, steps = self._shown(method), int(forwards * method.share) // method.forwards
        task.reset()
        task.watch_memory()
        where = {"placement": "shadow"} if self.options.compiled and method.build is not adam else {}
        optimizer = method.build(task.model, lr=lr, eps=EPS, seed=seed, **method.settings, **where)
        batches = task.batches(BATCH, seed)
        step = self._stepper(method, task, optimizer, next(batches))
        at = {round(i * steps / looks) for i in range(1, looks + 1)} if looks else {steps}
        curve = [{"step": 0, **task.evaluate("test")}] if looks else []
        task.forget_peak()  # of the evaluation
        seconds, done, cut, peak, start = 0.0, 0, False, 0, self._now()
        while done < steps and not cut:
            step(next(batches))
            done += 1
            if done % LOOK_AT_CLOCK == 0:
                self._now()
                cut = self.left() < 0
            if done in at or cut:
                seconds += self._now() - start
                peak = max(peak, task.memory() or 0)
                if looks:
                    curve.append({"step": done, **task.evaluate("test")})
                task.forget_peak()
                start = self._now()
        return {"seed": seed, "steps": done, "cut": cut, "seconds_per_step": seconds / done,
                "bytes": peak or None, "curve": curve}  # fmt: skip

    def _now(self) -> float:
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
        return time.perf_counter()

    def _stepper(self, method: Method, task: Sentiment, optimizer: Any, sample: Batch) -> Callable[[Batch], object]:
        if method.build is adam:

            def backward(batch: Batch) -> None:
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    task.loss(batch).backward()
                optimizer.step()

            return backward
        if self._captures(method):
            return zokern.GraphedStep(optimizer, task.loss, sample)

        def eager(batch: Batch) -> Tensor:
            loss: Tensor = optimizer.step(lambda: task.loss(batch))
            return loss

        return eager


def _former(path: Path, settings: Settings, device: torch.device) -> Settings:
    """The results of a benchmark that was broken off, where it had the same settings."""
    if not path.is_file():
        return {}
    stored: Settings = json.loads(path.read_text())
    if stored["complete"] or stored["settings"] != settings:
        raise SystemExit(f"{path} holds other results, or whole ones; give another --output, or remove it")
    here = zokern.bench.record.machine(device)
    if stored["machine"] != here:
        raise SystemExit(f"{path} was begun on {stored['machine']}, this is {here}; give another --output")
    results: Settings = stored["results"]
    return results


def main() -> int:
    parser = study.parser(
        __doc__,
        model=("smollm2", "as zokern finetune takes it: smollm2, a folder that save_pretrained wrote, or a .gguf file"),
        methods=(list(METHODS), f"of {', '.join(METHODS)} (default: all)"),
        budget=(16_000, "forwards of a run"),
        trial=(3_000, "forwards of a run that chooses lr"),
        seconds=(0, "end after so many; 0: when all is done"),
        compiled=(False, "the forward of training batches by torch.compile, and placement shadow, which it needs"),
    )
    options = parser.parse_args()
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here; on a CPU take python -m benchmarks.llm.protocol")
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    path = options.output or RESULTS / "llm-cuda.json"
    task = load(options.model, device, dtype)
    settings = {
        "parameters": sum(p.numel() for p in task.model.parameters()), "dtype": str(dtype).removeprefix("torch."),
        "batch_size": BATCH, "tokens": LONGEST, "eps": EPS, "budget": options.budget, "trial": options.trial,
        "compiled": options.compiled, "template": reviews.TEMPLATE, "words": list(reviews.WORDS), "sizes": reviews.SIZES,
    }  # fmt: skip
    results = _former(path, settings, device)
    task.follow(task.model, compiled=options.compiled)
    if "start" not in results:
        results["start"] = {name: task.evaluate(name) for name in ("validation", "test")}
        results["inference"] = task.inference(BATCH)

    def keep(found: Settings, complete: bool = False) -> None:
        store("llm", device, settings, found, path, complete=complete)

    bench = Bench(task, keep, options, results)
    try:
        with torch.no_grad():
            bench.all()
    except OutOfTime:
        print(f"the time is up; the same command goes on with {path}")
        return 0
    keep(results, set(results) > set(METHODS))
    print(f"stored {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every hyper-parameter of a fine-tuning run, with its default, and the checks that need nothing loaded.

The command line and Python share this one class, so that both have the same defaults and the same error messages.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from zokern.finetune.methods import METHODS, OWN

REMEDY = 'install the extra with: pip install "zokern[finetune]"'
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("auto", "similarity", "classifier", "prompt"),
    "method": tuple(METHODS),
    "update": ("sgd", "momentum", "adam", "adamezo", "sign"),
    "curvature_dtype": ("float32", "bfloat16"),
    "shaping": ("standardised", "ranked"),
    "distribution": ("normal", "rademacher"),
    "rounding": ("auto", "nearest", "stochastic"),
    "placement": ("auto", "inplace", "shadow", "stream"),
    "backend": ("auto", "cuda", "triton", "cpu", "reference"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
# option: (smallest, largest, smallest itself allowed). Integers and floats alike.
RANGES: dict[str, tuple[float, float, bool]] = {
    "steps": (1, math.inf, True),
    "batch_size": (1, math.inf, True),
    "lr": (0.0, math.inf, True),
    "eps": (0.0, math.inf, False),
    "weight_decay": (0.0, math.inf, True),
    "num_samples": (1, 1024, True),
    "beta1": (0.0, 1.0, True),
    "beta2": (0.0, 1.0, True),
    "delta": (0.0, math.inf, True),
    "horizon": (1, 1 << 20, True),
    "num_dropped": (0, math.inf, True),
    "smoothing": (0.0, 1.0, True),
    "anneal_steps": (0.0, math.inf, False),
    "hessian_interval": (1, math.inf, True),
    "gamma": (0.0, math.inf, True),
    "floor": (0.0, math.inf, True),
    "candidates": (2, 1 << 16, True),
    "elite": (0.0, 1.0, False),
    "num_directions": (2, 1 << 16, True),
    "seed": (0, 2**63 - 1, True),
    "warmup_steps": (0, math.inf, True),
    "accumulate": (1, math.inf, True),
    "max_length": (4, math.inf, True),
    "temperature": (0.0, math.inf, False),
    "eval_every": (0, math.inf, True),
    "eval_batch_size": (1, math.inf, True),
    "log_every": (1, math.inf, True),
    "limit_train": (1, math.inf, True),
    "limit_eval": (1, math.inf, True),
    "threads": (1, 4096, True),
}


class FinetuneError(ValueError):
    """Something the user can mend; the message says what, where and how."""


@dataclasses.dataclass
class Options:
    """All settings of one run. Units: lr, eps and weight_decay are per step and dimensionless; lengths are tokens."""

    model: str = "demo"
    data: str = "docstrings"
    objective: str = "auto"
    text_column: str = "text"
    label_column: str = "label"
    eval_data: str | None = None
    descriptions: Path | None = None
    template: str = "{text} Topic:"
    verbalizers: Path | None = None
    temperature: float = 0.05
    max_length: int = 64
    limit_train: int | None = None
    limit_eval: int | None = None

    method: str = "mezo"
    lr: float | None = None
    eps: float = 1e-3
    weight_decay: float = 0.0
    num_samples: int | None = None
    one_sided: bool | None = None
    update: str | None = None
    beta1: float | None = None
    beta2: float | None = None
    delta: float | None = None
    horizon: int | None = None
    num_dropped: int | None = None
    smoothing: float | None = None
    curvature_dtype: str | None = None
    anneal_steps: float | None = None
    hessian_interval: int | None = None
    gamma: float | None = None
    floor: float | None = None
    candidates: int | None = None
    elite: float | None = None
    num_directions: int | None = None
    shaping: str | None = None
    antithetic: bool | None = None
    distribution: str | None = None
    seed: int = 0
    rounding: str = "auto"
    placement: str = "auto"
    pipelined: bool = False
    backend: str = "auto"

    steps: int = 500
    batch_size: int = 16
    accumulate: int = 1
    lr_schedule: str = "linear"
    warmup_steps: int = 0

    eval_every: int = 100
    eval_batch_size: int = 64
    log_every: int = 10

    output: Path = Path("zokern-out")
    force: bool = False
    journal: bool = True

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        """Paths may be given as strings."""
        self.output = Path(self.output)
        self.descriptions = None if self.descriptions is None else Path(self.descriptions)
        self.verbalizers = None if self.verbalizers is None else Path(self.verbalizers)

    def check(self) -> None:
        """Raise FinetuneError naming the option, its value and what is allowed, before anything is loaded."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise FinetuneError(f"{flag(name)} is {value!r}; allowed: {', '.join(allowed)}")
        for name, (low, high, closed) in RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or not (low <= value if closed else low < value) or value > high:
                bounds = f"{'at least' if closed else 'above'} {low:g}" + (
                    f", at most {high:g}" if high < math.inf else ""
                )
                raise FinetuneError(f"{flag(name)} is {value}; allowed: {bounds}")
        for name in OWN:
            if getattr(self, name) is not None and name not in METHODS[self.method].takes:
                takers = ", ".join(method for method, entry in METHODS.items() if name in entry.takes)
                raise FinetuneError(f"{flag(name)} is not a setting of --method {self.method}; it belongs to {takers}")
        if self.pipelined and self.placement == "inplace":
            raise FinetuneError(
                "--pipelined writes perturbed weights into copies, and --placement inplace has none; "
                "take --placement shadow or stream"
            )
        if self.warmup_steps > self.steps:
            raise FinetuneError(
                f"--warmup-steps is {self.warmup_steps}; allowed: at most --steps, which is {self.steps}"
            )
        if "{text}" not in self.template:
            raise FinetuneError(f"--template is {self.template!r}; it must contain {{text}}, where each text is put in")
        if not (
            self.device in ("auto", "cpu", "cuda") or (self.device.startswith("cuda:") and self.device[5:].isdigit())
        ):
            raise FinetuneError(f"--device is {self.device!r}; allowed: auto, cpu, cuda, cuda:0, cuda:1, ...")
        if self.eval_data is not None and self.data == "docstrings":
            raise FinetuneError("--eval-data needs --data: the embedded docstrings bring their own held-out sentences")
        self._check_paths()

    def _check_paths(self) -> None:
        for name in ("descriptions", "verbalizers"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise FinetuneError(
                    f"{flag(name)} is {str(path)!r}, which is not a file; give a JSON file {{label: text}}"
                )
        for name in ("data", "eval_data"):
            value = getattr(self, name)
            if value is not None and value.endswith((".csv", ".tsv", ".jsonl", ".json")) and not Path(value).is_file():
                raise FinetuneError(f"{flag(name)} is {value!r}, which is not a file here ({Path.cwd()})")
        if self.output.exists() and not self.output.is_dir():
            raise FinetuneError(f"--output is {str(self.output)!r}, which is a file; give a directory")
        if self.output.is_dir() and any(self.output.iterdir()) and not self.force:
            raise FinetuneError(
                f"--output {str(self.output)!r} is not empty; give another directory, "
                "or --force to replace an earlier run there"
            )

    @classmethod
    def load(cls, directory: Path) -> Options:
        """The options of the run in a directory, for it to go on there."""
        path = Path(directory) / "options.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            options = cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise FinetuneError(f"--resume: {path} cannot be read ({error}); give the --output of a run") from error
        return dataclasses.replace(options, output=Path(directory))

    def as_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def flag(name: str) -> str:
    """The command-line spelling of a field: eval_every -> --eval-every."""
    return "--" + name.replace("_", "-")

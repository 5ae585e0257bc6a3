"""What is done with a journal from elsewhere: shown, compared, replayed on small weights, a run taken up from it.

Each either does its work or raises JournalError; nothing else is right, and nothing is written outside its tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import zokern
from zokern import journal
from zokern.cli.journals import show_lines
from zokern.journal import tools

NAMES = ("show", "diff", "replay", "until", "resume")


def weights() -> dict[str, Tensor]:
    """The corpus' parameters: sizes round a vector, in all dtypes."""
    return {
        f"{str(dtype).removeprefix('torch.')}.{size}": (torch.arange(size) / 8.0 - 1.0).to(dtype)
        for dtype, size in ((torch.float32, 33), (torch.float32, 5), (torch.bfloat16, 17), (torch.float16, 9))
    }


def optimizer(method: str, **settings: object) -> tuple[dict[str, Tensor], zokern.optim.ZerothOrderOptimizer]:
    params = {name: torch.nn.Parameter(t) for name, t in weights().items()}
    named = list(params.items())
    groups = [{"params": named[:2]}, {"params": named[2:], "eps": 2e-3}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(params), zokern.optim.METHODS[method](groups, 1e-2, **settings)


def all_of(path: Path, other: Path, names: Iterable[str] = NAMES) -> set[str]:
    """Does what is named with a journal; says what was done without an error. other: a good journal, for comparisons."""
    done = set()
    for name in names:
        do = {"show": _show, "diff": _diff, "replay": _replay, "until": _until, "resume": _resume}[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                do(path, other)
        except journal.JournalError as error:
            said = str(error)
            if not said.isprintable() or str(path) not in said:
                raise AssertionError(f"what is meant? {said!r}") from error
            continue
        done.add(name)
    return done


def _show(path: Path, other: Path) -> None:
    assert all(line.isprintable() for line in show_lines(tools.summary(path)))


def _diff(path: Path, other: Path) -> None:
    tools.first_difference(path, other)
    tools.first_difference(path, path)


def _replay(path: Path, other: Path) -> None:
    journal.replay(path, weights(), verify=False)


def _until(path: Path, other: Path) -> None:
    journal.replay(path, weights(), until=2)


def _resume(path: Path, other: Path) -> None:
    header = journal.Reader(path).header
    if header["method"] not in KINDS:
        return
    method, settings = KINDS[header["method"]]
    params, made = optimizer(method, **settings)
    before = path.read_bytes()
    try:
        with journal.resume(made, path):
            step(made, params)
    finally:
        for kept in path.parent.glob(f"{path.name}.cut*"):
            kept.unlink()
        path.write_bytes(before)


def step(made: zokern.optim.ZerothOrderOptimizer, params: dict[str, Tensor]) -> None:
    """A step, or its refusal where the file has left weights too small for eps, which their dtype could not take away
    again."""
    try:
        made.step(lambda: sum(p.float().square().mean() for p in params.values()))  # type: ignore[arg-type]
    except ValueError as error:
        if not re.match(r"eps( of group \d+)? is \S+, and the weights' rms is ", str(error)):
            raise


KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "MeZO": ("mezo", {"update": "adamezo", "horizon": 3}),
    "HiZOO": ("hizoo", {"smoothing": 0.1, "curvature_dtype": torch.bfloat16}),
    "HELENE": ("helene", {"hessian_interval": 2}),
    "ES": ("es", {"num_directions": 2}),
    "FZOO": ("fzoo", {"candidates": 2}),
}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    **{name.lower(): kind for name, kind in KINDS.items()},
    "plain": ("mezo", {"weight_decay": 0.1}),
    "momentum": ("mezo", {"update": "momentum"}),
    "adam": ("mezo", {"update": "adam", "num_samples": 2}),
    "sign": ("mezo", {"update": "sign", "distribution": "rademacher"}),
    "gv": ("mezo-gv", {"candidates": 2, "smoothing": 0.1}),
}

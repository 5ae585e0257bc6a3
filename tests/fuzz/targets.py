"""What is done with a journal from elsewhere: shown, compared, replayed on small weights, a run taken up from it.

Each either does its work or raises JournalError; nothing else is right, and nothing is written outside its tensors.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import zokern
from zokern import journal
from zokern.cli.journals import show_lines
from zokern.hashing import hash_of
from zokern.journal import tools
from zokern.journal.format import FOLDS, LOW_RANK
from zokern.optim import METHODS

NAMES = ("show", "diff", "replay", "until", "verified", "resume")


class Case(NamedTuple):
    """blocks: on the matrices of a module, which directions of low rank, waiting updates and layers need."""

    method: str
    settings: dict[str, object]
    blocks: bool = False


def weights() -> dict[str, Tensor]:
    """The parameters of most cases: sizes round a vector, in all dtypes."""
    return {
        f"{str(dtype).removeprefix('torch.')}.{size}": (torch.arange(size) / 8.0 - 1.0).to(dtype)
        for dtype, size in ((torch.float32, 33), (torch.float32, 5), (torch.bfloat16, 17), (torch.float16, 9))
    }


class Blocks(torch.nn.Module):
    """What the corpus' other cases need: matrices, in blocks, whose forward can be perturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 5), torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)])
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_((torch.arange(p.numel()).reshape(p.shape) - i) / 16.0)
        self.blocks[1].bfloat16()

    def forward(self) -> Tensor:
        x = torch.arange(10.0).reshape(2, 5) / 8.0
        for block in self.blocks:
            x = torch.tanh(block(x.to(block.weight.dtype))).float()
        return x.square().mean()


class Run(NamedTuple):
    """An optimizer, its parameters by name, and a loss of these."""

    made: zokern.optim.ZerothOrderOptimizer
    params: dict[str, torch.nn.Parameter]
    loss: Callable[[], Tensor]


def begin(case: Case) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build = METHODS[case.method]
        if case.blocks:
            model = Blocks()
            return Run(build(model, 1e-2, **case.settings), dict(model.named_parameters()), model)
        params = {name: torch.nn.Parameter(t) for name, t in weights().items()}
        named = list(params.items())
        groups = [{"params": named[:2]}, {"params": named[2:], "eps": 2e-3}]
        made = build(groups, 1e-2, **case.settings)
    return Run(made, params, lambda: sum(p.float().square().mean() for p in params.values()))  # type: ignore[return-value]


def tensors(header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that its case starts from."""
    case = CASES.get(case_of(header))
    blocks = case is not None and case.blocks
    return {name: p.detach() for name, p in Blocks().named_parameters()} if blocks else weights()


class End(NamedTuple):
    """Of one thing that was done with a journal. refused: by which message, after the file's name; "" where it was done.
    weights: their hash after it, where it changes them and no forward does."""

    refused: str = ""
    weights: str = ""


def all_of(path: Path, others: Mapping[str, Path], names: Iterable[str] = NAMES) -> dict[str, End]:
    """Does what is named with a journal. others: good ones of each case, for comparisons.

    Raises:
        AssertionError: for a refusal that does not name the file, would move a terminal's cursor, or comes after weights
            have been changed, but for one that says so.
    """
    return {name: _end(name, path, others) for name in names}


def outline(ends: Mapping[str, End]) -> dict[str, Any]:
    """What was done, with the weights after it where it changes them; by which messages the rest was refused."""
    return {
        "done": {name: end.weights for name, end in ends.items() if not end.refused},
        "refused": sorted({masked(end.refused) for end in ends.values() if end.refused}),
    }


def masked(message: str) -> str:
    """Without what differs from input to input: numbers, what is quoted or in brackets."""
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "''", message)
    numberless = re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?|inf|nan", "#", unquoted)
    return re.sub(r"[\[{(].*[\]})]", "[]", numberless)


def _end(name: str, path: Path, others: Mapping[str, Path]) -> End:
    do: dict[str, Callable[[], str | None]] = {
        "show": lambda: _show(path),
        "diff": lambda: _diff(path, others),
        "replay": lambda: _replay(path, verify=False, fold=False),
        "until": lambda: _replay(path, until=2),
        "verified": lambda: _replay(path, fold=True),
        "resume": lambda: _resume(path),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return End(weights=do[name]() or "")
    except journal.JournalError as error:
        said = str(error)
        if not said.isprintable() or str(path) not in said:
            raise AssertionError(f"what is meant? {said!r}") from error
        return End(said.replace(str(path), ""))


def _show(path: Path) -> None:
    assert all(line.isprintable() for line in show_lines(tools.summary(path)))


def _diff(path: Path, others: Mapping[str, Path]) -> None:
    tools.first_difference(path, others[case_of(journal.Reader(path).header) or "plain"])
    tools.first_difference(path, path)


def _replay(path: Path, **options: Any) -> str:
    params = tensors(journal.Reader(path).header)
    with _unchanged(params):
        journal.replay(path, params, **options)
    return _hash(params)


@contextlib.contextmanager
def _unchanged(params: Mapping[str, Tensor]) -> Iterator[None]:
    """Where it is refused, but for weights that came out other than training had them."""
    before = _hash(params)
    try:
        yield
    except journal.JournalError as error:
        if "are not those that training had" not in str(error) and _hash(params) != before:
            raise AssertionError(f"weights are changed: {error}") from error
        raise


def _hash(params: Mapping[str, Tensor]) -> str:
    """A NaN's other bits are the processor's own."""
    return hash_of((name, torch.where(p.isnan(), torch.nan, p)) for name, p in params.items())


def _resume(path: Path) -> None:
    name = case_of(journal.Reader(path).header)
    if not name:
        return
    run, before = begin(CASES[name]), path.read_bytes()
    try:
        with _unchanged(run.params), journal.resume(run.made, path):
            step(run)
    finally:
        for kept in path.parent.glob(f"{path.name}.cut*"):
            kept.unlink()
        path.write_bytes(before)


def step(run: Run) -> None:
    """A step, or its refusal where the file has left weights too small for eps, which their dtype could not take away
    again."""
    try:
        run.made.step(run.loss)
    except ValueError as error:
        if not re.match(r"eps( of group \d+)? is \S+, and the weights' rms is ", str(error)):
            raise


CASES: dict[str, Case] = {
    "mezo": Case("mezo", {"update": "adamezo", "horizon": 3}),
    "hizoo": Case("hizoo", {"smoothing": 0.1, "curvature_dtype": torch.bfloat16}),
    "helene": Case("helene", {"hessian_interval": 2}),
    "es": Case("es", {"num_directions": 2}),
    "fzoo": Case("fzoo", {"candidates": 2}),
    "plain": Case("mezo", {"weight_decay": 0.1}),
    "momentum": Case("mezo", {"update": "momentum"}),
    "adam": Case("mezo", {"update": "adam", "num_samples": 2}),
    "sign": Case("mezo", {"update": "sign", "distribution": "rademacher"}),
    "gv": Case("mezo-gv", {"candidates": 2, "smoothing": 0.1}),
    "lowrank": Case("mezo", {"distribution": "lowrank:2", "num_samples": 2, "placement": "inplace"}, True),
    "folded": Case("mezo", {"distribution": "lowrank:1", "placement": "forward", "fold_every": 3}, True),
    "lezo": Case("lezo", {"num_dropped": 1, "placement": "inplace"}, True),
}
OF_MEZO = {"adamezo": "mezo", "sgd": "plain", "momentum": "momentum", "adam": "adam", "sign": "sign"}  # by update
OTHERS = {METHODS[case.method].__name__: name for name, case in CASES.items() if case.method != "mezo"}


def case_of(header: Mapping[str, Any]) -> str:
    """The case that a run with this header is taken up as; "" for none."""
    features, method, update = header.get("features", []), header["method"], header["options"].get("update")
    if method != "MeZO":
        return OTHERS.get(method, "")
    if FOLDS in features or LOW_RANK in features:
        return "folded" if FOLDS in features else "lowrank"
    return OF_MEZO.get(update, "") if isinstance(update, str) else ""

"""How far a step moves the weights: counted where it is more than a quarter of their size, and told once.

The move of an element is (decay - 1) w and what the update's rule adds, whose mean square follows from the pass' numbers
alone, since directions have variance 1 and do not depend on each other: exactly for signs, in expectation for normals. The
size of the weights is rms, the root of the mean w^2 over the trained elements that are not 0; it is taken once, and again
when parameters have become others.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokern import parts
from zokern._checks import ZokernWarning
from zokern.deltas import Delta
from zokern.distributed import shards
from zokern.optim import callers
from zokern.optim.arriving import Arriving
from zokern.optim.ledger import Ledger
from zokern.optim.parameters import Active
from zokern.passes.update import CPU, Update, sent

LIMIT = 0.25  # of rms
FEW = 16  # rows, from which on torch is faster than Python
CHUNK = 1 << 22  # elements that are squared at once


Numbers = Mapping[str, Any]


def _axpy(squares: Any, curvature: Any, of: Numbers) -> Any:
    """A z."""
    return squares


def _hizoo(squares: Any, curvature: Any, of: Numbers) -> Any:
    """G z / sqrt(h'), for the mean h' where h is 1, as at its start."""
    return squares / (1.0 - of["smoothing"] + curvature)


def _momentum(squares: Any, curvature: Any, of: Numbers) -> Any:
    """step m' of a run whose steps all measure as much as this one."""
    return of["step"] ** 2 * squares / (1.0 - of["beta"] ** 2)


def _helene(squares: Any, curvature: Any, of: Numbers) -> Any:
    """As momentum, over an h' that is at least what this step adds to it."""
    largest: Any = torch.maximum if isinstance(curvature, Tensor) else max
    divisor = of["gamma"] * largest(curvature, of["floor"]) + of["delta"]
    return of["step"] ** 2 * squares / ((1.0 - of["beta1"] ** 2) * divisor**2)


def _adam(squares: Any, curvature: Any, of: Numbers) -> Any:
    """lr m^ / sqrt(v^), which is about lr where all steps measure the same, and less else."""
    return of["lr"] ** 2


def _adamezo(squares: Any, curvature: Any, of: Numbers) -> Any:
    """step G z / sqrt(V z^2 + delta), for the mean V z^2."""
    return of["step"] ** 2 * squares / (curvature + of["delta"])


def _sign(squares: Any, curvature: Any, of: Numbers) -> Any:
    """step."""
    return of["step"] ** 2


# The mean square of what a rule adds to a weight: of every rule that an update may have. Of one row, in numbers of
# Python's, or of all in tensors [R]. squares: the mean square of sum_k c_k z_k, c being A or G; curvature: the mean of
# sum_k V_k z_k^2; of: the shared numbers by name, and lr.
ADDED: dict[str, Callable[[Any, Any, Numbers], Any]] = {
    "axpy": _axpy,
    "hizoo": _hizoo,
    "helene": _helene,
    "momentum": _momentum,
    "adam": _adam,
    "adamezo": _adamezo,
    "sign": _sign,
}
ALONE = ("adam", "sign")  # whose steps do not depend on the coefficients


def added(update: Update, lr: Tensor) -> Tensor:
    """That mean square [R], by torch."""
    squares = None if update.rule in ALONE else update.coefs["A" if "A" in update.coefs else "G"].square().sum(dim=1)
    curvature = update.coefs.get("V")
    if curvature is not None:
        curvature = (curvature.square() if update.square_of_sum else curvature).sum(dim=1)
    mean: Tensor = ADDED[update.rule](squares, curvature, {"lr": lr, **update.shared})
    return mean


def mean_square(params: Iterable[Tensor]) -> Tensor:
    """Of all elements that are not 0; 0 where there are none. float64, 0-d, on the first GPU that has any; never waits,
    but where tensors are sharded for the other ranks, which get the same bits."""
    whole: dict[torch.device, list[Tensor]] = {}
    sharded: dict[torch.device, list[Tensor]] = {}
    for p in params:
        if not isinstance(p, Delta):
            (sharded if parts.is_dtensor(p) else whole).setdefault(p.device, []).append(p.detach())
    sums = {device: [_squares(tensors)] for device, tensors in whole.items()}
    for device, tensors in sharded.items():
        own = _squares([parts.local(t) for t in tensors])
        sums.setdefault(device, []).append(shards.totals(tensors, own))
    home = next((device for device in sums if device.type != "cpu"), torch.device("cpu"))
    total = torch.zeros(2, dtype=torch.float64, device=home)
    for each in sums.values():
        total += sent(torch.cat(each).sum(dim=0), home)
    return total[0] / total[1].clamp(min=1.0)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of each of one device, the sum of its squares, and how many are not 0: float64 [T, 2]."""
    pieces = [_pieces(t) for t in tensors]
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for each in pieces for piece in each]
    counts = [torch.count_nonzero(piece) for each in pieces for piece in each]
    # What follows the reductions is done at once for all, as most tensors of a model are small.
    both = torch.stack((torch.stack(norms).to(torch.float64).square(), torch.stack(counts).to(torch.float64)), dim=1)
    if len(norms) == len(tensors):
        return both
    of_each = both.split(list(map(len, pieces)))
    return torch.stack([functools.reduce(torch.add, rows.unbind()) for rows in of_each])


def _pieces(t: Tensor) -> Sequence[Tensor]:
    if t.numel() <= CHUNK:
        return (t,)
    pieces: Sequence[Tensor] = t.split(max(1, CHUNK // t[0].numel()))
    return pieces


class Moves:
    """Of one optimizer. `seen`: float64 [2], how many steps moved the weights by more than LIMIT of their rms, and the
    square of the largest ratio; on the device of the losses or the weights.
    """

    def __init__(self) -> None:
        self.seen = torch.zeros(2, dtype=torch.float64, device=CPU)
        self.coming: Arriving | None = None  # `seen`
        self.square: Tensor | None = None  # mean_square of the trained weights
        self.version = -1  # of the parameters that it is of
        self.active: Callable[[], Active | None] = lambda: None  # held weakly: it holds states
        self._square = 0.0  # `square`, where the host has it
        self._whole: tuple[object, ...] = ()  # of the weights, what is the same on all ranks
        self._parts: list[float] = []  # of the rows of `active` in its elements
        self._shares: Tensor | None = None  # the same, on the device; None for one row
        self._steps = 0
        self._warned = False

    def tensors(self, *, gated: bool = False) -> list[Tensor]:
        """What a captured step works on. gated: the shares of its rows are found on the device."""
        return [self.seen, *(t for t in (self.square, None if gated else self._shares) if t is not None)]

    @property
    def rms(self) -> float:
        """Of the trained weights that are not 0; 0 where the host does not know it."""
        return math.sqrt(self._square)

    def begin(self, version: int, params: Iterable[Tensor], active: Active) -> None:
        """Before a step does anything: the weights are clean. version: of the parameters; params: the trained ones."""
        if version != self.version and self._is_new(params := list(params)):
            square = mean_square(params)
            if self.square is None or self.square.device != square.device:
                self.square = square
            else:
                self.square.copy_(square)  # where it is: a captured step may read it
            self._square = self.square.item() if self.square.device.type == "cpu" else 0.0
        self.version = version
        if active is not self.active():
            total = max(1, sum(active.sizes))
            self._parts = [size / total for size in active.sizes]
            self._shares = torch.tensor(self._parts, dtype=torch.float64, device=CPU) if len(self._parts) > 1 else None
            self.active = weakref.ref(active)

    def _is_new(self, params: list[Tensor]) -> bool:
        """Whether their size has to be looked at again. That of shards takes all ranks, so it depends on what all see; a
        rank's own part may come to lie elsewhere."""
        before, self._whole = self._whole, shards.whole_look(params)
        return not self._whole or self._whole != before

    def note(
        self, update: Update, lr: Tensor, ok: Tensor, gate: Tensor | None, advice: Callable[[], str], ledger: Ledger
    ) -> None:
        """An update that is about to be done, where it is ok.

        Raises:
            ValueError: for a rule that is not known here, so that no step goes unmeasured.
        """
        assert self.square is not None
        if update.rule not in ADDED:
            raise ValueError(
                f"the rule {update.rule!r} has no place in zokern/optim/moves.py; add how far it moves a weight"
            )
        device = ok.device if ok.device.type != "cpu" else self.square.device
        if device.type == "cpu" and gate is None:
            if ok and self._square:  # weights that are all 0 have no size
                few = len(self._parts) <= FEW
                ratio = self._ratio(update, lr) if few else float(self._by_torch(update, lr, device))
                if LIMIT**2 < ratio < math.inf:
                    self._note_on_host(ratio, advice, ledger)
            return
        total = self._by_torch(update, lr, device)
        total = torch.where(sent(ok, device) & (total < math.inf), total, 0.0)
        self.seen = sent(self.seen, device)
        ledger.add(self.seen[0], total > LIMIT**2)
        torch.maximum(self.seen[1], total, out=self.seen[1])
        if gate is None:
            self.look()

    def _by_torch(self, update: Update, lr: Tensor, device: torch.device) -> Tensor:
        """The square of how far the update goes, in units of the rms, 0-d."""
        assert self.square is not None
        rows = sent(added(update, lr), device) / sent(self.square, device)
        rows = rows + sent((1.0 - update.shared["decay"]).square(), device)
        active = self.active()
        if active is not None and active.gated is not None:
            rows = rows * active.gated.shares()
        elif self._shares is not None:
            self._shares = sent(self._shares, device)
            rows = rows * self._shares
        return rows.sum()

    def _ratio(self, update: Update, lr: Tensor) -> float:
        """The same in numbers of Python's, which for a few rows take a tenth of the time."""
        plain, rule, ratio = update.plain, ADDED[update.rule], 0.0
        names, columns = ("lr", *update.shared), zip(lr.tolist(), *map(plain.__getitem__, update.shared), strict=True)
        rows = plain["A" if "A" in plain else "G"], plain.get("V", [()] * len(self._parts)), columns
        try:
            for part, first, second, column in zip(self._parts, *rows, strict=True):
                of = dict(zip(names, column, strict=True))
                curvature = math.hypot(*second) ** 2 if update.square_of_sum else sum(second)
                moved = rule(math.hypot(*first) ** 2, curvature, of) / self._square
                ratio += part * (moved + (1.0 - of["decay"]) ** 2)
        except ZeroDivisionError:  # of tensors: inf, or nan
            return math.inf
        return ratio

    def _note_on_host(self, ratio: float, advice: Callable[[], str], ledger: Ledger) -> None:
        before = self.seen
        count, worst = before.tolist()
        ledger.undo(lambda: setattr(self, "seen", before))
        self.seen = torch.tensor([count + 1.0, max(worst, ratio)], dtype=torch.float64, device=CPU)
        self.tell(advice)

    def look(self) -> None:
        """Starts a copy of `seen` to the host now and then, to be looked at in a later step without waiting."""
        self._steps += 1
        if self.seen.device.type != "cpu" and self.coming is None and not self._warned and self._steps % 16 == 1:
            self.coming = Arriving(self.seen)

    def tell(self, advice: Callable[[], str]) -> None:
        """Warns once, if the host knows of a step that went too far."""
        if self._warned:
            return
        count, square = 0.0, 0.0
        if self.seen.device.type == "cpu":
            count, square = self.seen.tolist()
        elif self.coming is not None and (come := self.coming.values()) is not None:
            (count, square), self.coming = come, None
        if count:
            self._warned = True
            warnings.warn(
                f"a step moves the trained weights by {square**0.5:.2g} times their rms (of those that are not 0), and more"
                f" than {LIMIT:g} takes away what a model has learnt: lower lr"
                + (f"; {said}" if (said := advice()) else "")
                + ". Further such steps are only counted: see large_steps.",
                ZokernWarning,
                stacklevel=callers.level(),
            )

"""The methods in float64, from their equations: every perturbed state is written down, nothing is merged.

Slow and obvious on purpose, and no line of it comes from zokern.optim: only the noise and the seeds are the contract's.
Direction k of step t is z(derive_seed(run seed, t, k)). PassNumbers that divide by eps use each parameter group's own.
`theta` maps the tensor id (the position among all parameters of the module) to a float64 array. `dropped(t)` names the
tensors that step t leaves out (LeZO): not perturbed, not updated, not decayed, and their state stays. A step in which any
loss is not finite changes nothing and still counts as a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from zokern.contract import reference

Theta = dict[int, np.ndarray]
Loss = Callable[[Theta], Any]
Direction = Callable[[int], np.ndarray]  # of a tensor id


@functools.lru_cache(maxsize=256)
def noise(n: int, seed: int, tensor_id: int, distribution: str) -> np.ndarray:
    return reference.noise(n, seed, tensor_id, 0, distribution).astype(np.float64)


@dataclass
class Group:
    """A parameter group: the tensor ids in it and its hyper-parameters."""

    ids: Sequence[int]
    lr: float
    eps: float = 1e-3
    weight_decay: float = 0.0


def theta_of(module: nn.Module) -> Theta:
    """All parameters of a module, tied ones once, numbered in order."""
    return {i: p.detach().cpu().double().numpy().copy() for i, p in enumerate(module.parameters())}


def load(module: nn.Module, theta: Theta) -> None:
    """Writes theta into a module (for example a float64 copy whose losses the oracle uses)."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.from_numpy(theta[i]))


def nothing_dropped(step: int) -> set[int]:
    return set()


@dataclass
class Method:
    """What all methods share. A subclass has `measure`, which takes the losses, and `apply`, which moves the weights."""

    theta: Theta
    groups: Sequence[Group]
    distribution: str = "normal"
    seed: int = 0
    dropped: Callable[[int], set[int]] = nothing_dropped
    step_number: int = 0
    state: dict[int, dict[str, Any]] = field(default_factory=dict)  # by tensor id, as opt.state is by parameter
    losses: list[Any] = field(default_factory=list)  # of the last step

    def step(self, loss: Loss) -> float:
        """One step; returns the mean of its losses."""
        self.loss_function, self.losses = loss, []
        measured = self.measure()
        if all(np.isfinite(value).all() for value in self.losses):
            self.apply(measured)
        else:
            self.skip()
        self.step_number += 1
        return float(np.mean([np.mean(value) for value in self.losses]))

    def measure(self) -> Any:
        raise NotImplementedError

    def apply(self, measured: Any) -> None:
        raise NotImplementedError

    def skip(self) -> None:
        """What a skipped step still does to the state: nothing."""

    # -------------------------------------------------------------------------------------------------------- the parts

    def z(self, k: int, i: int) -> np.ndarray:
        """Direction k of this step, of tensor i."""
        seed = reference.derive_seed(self.seed, self.step_number, k)
        return noise(self.theta[i].size, seed, i, self.distribution).reshape(self.theta[i].shape)

    def direction(self, k: int) -> Direction:
        return lambda i: self.z(k, i)

    def active(self) -> Iterator[tuple[Group, int]]:
        """Every tensor that this step may move, with its group."""
        out = self.dropped(self.step_number)
        for group in self.groups:
            for i in group.ids:
                if i not in out:
                    yield group, i

    def state_of(self, i: int, **start: Any) -> dict[str, Any]:
        """The state of tensor i, made from `start` when the tensor is active for the first time."""
        return self.state.setdefault(i, dict(start))

    def loss_at_theta(self) -> Any:
        return self._record(self.loss_function(self.theta))

    def loss_at(self, sign: float, direction: Direction) -> Any:
        """The loss at theta + sign * eps * direction."""
        perturbed = dict(self.theta)
        for group, i in self.active():
            perturbed[i] = self.theta[i] + sign * group.eps * direction(i)
        return self._record(self.loss_function(perturbed))

    def _record(self, value: Any) -> Any:
        value = np.asarray(value, np.float64) if np.ndim(value) else float(value)
        self.losses.append(value)
        return value

    def move(self, group: Group, i: int, update: np.ndarray) -> None:
        """theta <- (1 - lr wd) theta - lr update, for tensor i."""
        decayed = (1.0 - group.lr * group.weight_decay) * self.theta[i]
        self.theta = {**self.theta, i: decayed - group.lr * update}


@dataclass
class MeZO(Method):
    """Two-sided or one-sided estimate, and what is made of it: sgd, momentum, adam, adamezo or sign."""

    num_samples: int = 1
    one_sided: bool = False
    update: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    delta: float = 1e-8
    horizon: int = 10
    scale: str = "paper"  # or "released": of adamezo
    history: list[dict[int, tuple[float, np.ndarray]]] = field(default_factory=list)  # newest first: id -> (c, z)

    def measure(self) -> list[tuple[float, float]]:
        if self.one_sided:
            at_theta = self.loss_at_theta()
            return [(self.loss_at(+1.0, self.direction(k)), at_theta) for k in range(self.num_samples)]
        pairs = []
        for k in range(self.num_samples):
            plus = self.loss_at(+1.0, self.direction(k))
            minus = self.loss_at(-1.0, self.direction(k))
            pairs.append((plus, minus))
        return pairs

    def apply(self, pairs: list[tuple[float, float]]) -> None:
        now = {}
        for group, i in self.active():
            width = group.eps if self.one_sided else 2.0 * group.eps
            c = [(a - b) / width for a, b in pairs]
            now[i] = (c[0], self.z(0, i))  # adamezo has one sample
            g = sum(c[k] * self.z(k, i) for k in range(self.num_samples)) / self.num_samples
            if self.scale == "released" and (self.horizon < 2 or self.step_number <= self.horizon):
                self.move(group, i, g)
            elif self.update == "adamezo":
                self.move(group, i, self.adamezo([now, *self.history], i))
            else:
                self.move(group, i, getattr(self, self.update)(g, i))
        self.history = [now, *self.history][: self.horizon]

    def skip(self) -> None:
        """A skipped step has no term, and time goes on for the others, as for a step that left the parameter out."""
        self.history = [{}, *self.history][: self.horizon]

    def sgd(self, g: np.ndarray, i: int) -> np.ndarray:
        return g

    def sign(self, g: np.ndarray, i: int) -> np.ndarray:
        return np.sign(g)

    def momentum(self, g: np.ndarray, i: int) -> np.ndarray:
        state = self.state_of(i, m=np.zeros_like(g))
        state["m"] = self.betas[0] * state["m"] + g
        return state["m"]

    def adam(self, g: np.ndarray, i: int) -> np.ndarray:
        b1, b2 = self.betas
        state = self.state_of(i, m=np.zeros_like(g), v=np.zeros_like(g), step=0)
        state["step"] += 1
        state["m"] = b1 * state["m"] + (1.0 - b1) * g
        state["v"] = b2 * state["v"] + (1.0 - b2) * g**2
        m = state["m"] / (1.0 - b1 ** state["step"])
        v = state["v"] / (1.0 - b2 ** state["step"])
        return m / (np.sqrt(v) + self.delta)

    def adamezo(self, history: list[dict[int, tuple[float, np.ndarray]]], i: int) -> np.ndarray:
        b1, b2 = self.betas
        m, v = np.zeros_like(self.theta[i]), np.zeros_like(self.theta[i])
        if self.scale == "released":  # sums, not averages, and a hundred times
            for age, terms in enumerate(history[: self.horizon]):
                if i in terms:
                    c, z = terms[i]
                    m += c * b1**age * z
                    v += c**2 * b2**age * z**2
            return 100.0 * m / (np.sqrt(v + self.delta) if b2 else 1.0)
        for age, terms in enumerate(history[: self.horizon]):
            if i in terms:
                c, z = terms[i]
                m += (1.0 - b1) * b1**age * c * z
                v += (1.0 - b2) * b2**age * c**2 * z**2
        return m / np.sqrt(v + self.delta)


class Curved(Method):
    """HiZOO's preconditioner, which MeZO-GV and MeZO-Greedy may use too: directions are divided by sqrt(h)."""

    smoothing: float | None

    def h(self, i: int) -> np.ndarray:
        return self.state_of(i, h=np.ones_like(self.theta[i]))["h"]

    def scaled(self, direction: Direction) -> Direction:
        """direction / sqrt(h), or the direction itself without preconditioner."""
        if self.smoothing is None:
            return direction
        return lambda i: direction(i) / np.sqrt(self.h(i))

    def curve(self, i: int, kappa_squares: np.ndarray) -> np.ndarray:
        """Moves h towards h * kappa_squares, and returns the new h."""
        h = self.h(i)
        new = (1.0 - self.smoothing) * h + self.smoothing * h * kappa_squares
        self.state[i]["h"] = np.clip(new, 2.0**-64, 2.0**64)
        return self.state[i]["h"]


def kappa_of(plus: float, minus: float, at_theta: float, eps: float) -> float:
    return abs(plus + minus - 2.0 * at_theta) / (2.0 * eps**2)


@dataclass
class HiZOO(Curved):
    num_samples: int = 1
    smoothing: float = 1e-8

    def measure(self) -> tuple[float, list[tuple[float, float]]]:
        at_theta = self.loss_at_theta()
        pairs = []
        for k in range(self.num_samples):
            plus = self.loss_at(+1.0, self.scaled(self.direction(k)))
            minus = self.loss_at(-1.0, self.scaled(self.direction(k)))
            pairs.append((plus, minus))
        return at_theta, pairs

    def apply(self, measured: tuple[float, list[tuple[float, float]]]) -> None:
        at_theta, pairs = measured
        for group, i in self.active():
            squares = np.zeros_like(self.theta[i])
            g = np.zeros_like(self.theta[i])
            for k, (plus, minus) in enumerate(pairs):
                squares += kappa_of(plus, minus, at_theta, group.eps) * self.z(k, i) ** 2 / self.num_samples
                g += (plus - minus) / (2.0 * group.eps) * self.z(k, i) / self.num_samples
            self.move(group, i, g / np.sqrt(self.curve(i, squares)))


@dataclass
class HELENE(Method):
    """`floor` gives lambda by tensor id. The loss may be a number, or an array with one for each example."""

    num_samples: int = 1
    betas: tuple[float, float] = (0.9, 0.99)
    anneal_steps: float = 1000
    hessian_interval: int = 10
    gamma: float = 1.0
    floor: Callable[[int], float] = lambda i: 1.0
    delta: float = 1e-8
    batch_size: int = 1

    def measure(self) -> list[tuple[Any, Any]]:
        pairs = []
        for k in range(self.num_samples):
            plus = self.loss_at(+1.0, self.direction(k))
            minus = self.loss_at(-1.0, self.direction(k))
            pairs.append((plus, minus))
        return pairs

    def apply(self, pairs: list[tuple[Any, Any]]) -> None:
        b1, b2 = self.betas
        alpha = b1 + (1.0 - b1) * np.exp(-self.step_number / self.anneal_steps)
        for group, i in self.active():
            zero = np.zeros_like(self.theta[i])
            state = self.state_of(i, m=zero, h=zero)
            g, squares = np.zeros_like(zero), np.zeros_like(zero)
            for k, (plus, minus) in enumerate(pairs):
                z = self.z(k, i)
                c = (np.mean(plus) - np.mean(minus)) / (2.0 * group.eps)
                g += c * z / self.num_samples
                if np.ndim(plus):
                    each = (plus - minus) / (2.0 * group.eps)
                    s = np.mean(each**2)
                else:
                    s = self.batch_size * c**2
                squares += s * z**2 / self.num_samples
            state["m"] = b1 * state["m"] + alpha * g
            if self.step_number % self.hessian_interval == 0:
                state["h"] = b2 * state["h"] + (1.0 - b2) * squares
            self.move(group, i, state["m"] / (self.gamma * np.maximum(state["h"], self.floor(i)) + self.delta))


@dataclass
class MeZOGV(Curved):
    candidates: int = 4
    elite: float = 0.5
    smoothing: float | None = None
    keep_best: bool = False
    best: dict[int, np.ndarray] | None = None  # the direction itself, by tensor id

    def measure(self) -> tuple[float | None, Direction, float, float, float]:
        at_theta = None if self.smoothing is None else self.loss_at_theta()
        tried = [{i: self.z(j, i) for i in self.theta} for j in range(self.candidates)]
        if self.best is not None:
            tried[-1] = self.best
        losses = [self.loss_at(+1.0, self.scaled(one.__getitem__)) for one in tried]
        # Stable: equal losses stay in order. NaN is the worst, also where the best is kept of a step that is skipped.
        order = sorted(range(self.candidates), key=lambda j: (np.isnan(losses[j]), losses[j]))
        n_top = int(np.floor(self.elite * self.candidates))
        top, bottom = order[:n_top], order[n_top:]
        variance = 1.0 / len(top) + 1.0 / len(bottom)

        def v(i: int) -> np.ndarray:
            return np.mean([tried[j][i] for j in top], axis=0) - np.mean([tried[j][i] for j in bottom], axis=0)

        if self.keep_best:
            self.best = tried[order[0]]
        plus = self.loss_at(+1.0, self.scaled(v))
        minus = self.loss_at(-1.0, self.scaled(v))
        return at_theta, v, variance, plus, minus

    def apply(self, measured: tuple[float | None, Direction, float, float, float]) -> None:
        at_theta, v, variance, plus, minus = measured
        for group, i in self.active():
            update = (plus - minus) / (2.0 * group.eps) * v(i)
            if at_theta is not None:
                kappa = kappa_of(plus, minus, at_theta, group.eps)
                update = update / np.sqrt(self.curve(i, kappa * v(i) ** 2 / variance**2))
            self.move(group, i, update)


@dataclass
class MeZOGreedy(Curved):
    candidates: int = 4
    smoothing: float | None = None

    def measure(self) -> tuple[float | None, int, float, float]:
        at_theta = None if self.smoothing is None else self.loss_at_theta()
        losses = [self.loss_at(+1.0, self.scaled(self.direction(j))) for j in range(self.candidates)]
        winner = min(range(self.candidates), key=lambda j: losses[j])  # the first of equals
        minus = self.loss_at(-1.0, self.scaled(self.direction(winner)))
        return at_theta, winner, losses[winner], minus

    def apply(self, measured: tuple[float | None, int, float, float]) -> None:
        at_theta, winner, plus, minus = measured
        for group, i in self.active():
            z = self.z(winner, i)
            update = (plus - minus) / (2.0 * group.eps) * z
            if at_theta is not None:
                kappa = kappa_of(plus, minus, at_theta, group.eps)
                update = update / np.sqrt(self.curve(i, kappa * z**2))
            self.move(group, i, update)


@dataclass
class FZOO(Method):
    distribution: str = "rademacher"
    candidates: int = 8
    scale: str = "paper"  # or "released"

    def measure(self) -> tuple[float, list[float]]:
        at_theta = self.loss_at_theta()
        return at_theta, [self.loss_at(+1.0, self.direction(j)) for j in range(self.candidates)]

    def apply(self, measured: tuple[float, list[float]]) -> None:
        at_theta, losses = measured
        # The mean of equal numbers need not be that number: a difference from it is no sign of a spread.
        sigma = 0.0 if len(set(losses)) == 1 else np.std(losses, ddof=0 if self.scale == "released" else 1)
        for group, i in self.active():
            update = np.zeros_like(self.theta[i])
            if sigma > 0.0:
                for j, value in enumerate(losses):
                    divisor = self.candidates if self.scale == "released" else group.eps * self.candidates
                    update += (value - at_theta) * self.z(j, i) / sigma / divisor
            self.move(group, i, update)


@dataclass
class ES(Method):
    """Climbs: the losses are rewards, and higher is better."""

    num_directions: int = 30
    shaping: str = "standardised"
    antithetic: bool = False
    scale: str = "paper"  # or "released"

    def measure(self) -> list[tuple[float, ...]]:
        rewards: list[tuple[float, ...]] = []
        for n in range(self.num_directions):
            plus = self.loss_at(+1.0, self.direction(n))
            rewards.append((plus, self.loss_at(-1.0, self.direction(n))) if self.antithetic else (plus,))
        return rewards

    def shaped(self, reward: float, every: list[float]) -> float:
        if self.shaping == "ranked":
            below, equal = sum(r < reward for r in every), sum(r == reward for r in every)
            rank = below + (equal - 1) / 2.0
            return rank / (len(every) - 1) - 0.5
        if len(set(every)) == 1:
            return 0.0
        return float((reward - np.mean(every)) / (np.std(every) + (1e-8 if self.scale == "released" else 0.0)))

    def apply(self, rewards: list[tuple[float, ...]]) -> None:
        every = [r for pair in rewards for r in pair]
        for group, i in self.active():
            ascent = np.zeros_like(self.theta[i])
            width = self.num_directions * (1.0 if self.scale == "released" else group.eps)
            for n, pair in enumerate(rewards):
                shaped = [self.shaped(r, every) for r in pair]
                if self.antithetic:
                    ascent += (shaped[0] - shaped[1]) * self.z(n, i) / (2.0 * width)
                else:
                    ascent += shaped[0] * self.z(n, i) / width
            self.move(group, i, -ascent)

"""The public passes: check once, pick the backend, launch; and their registration with torch.library.

    dst <- round(decay*src + sum_k coef_k z(seed_k))      and the other rules of zokern/contract/rules.py, with their states

z is never stored, and everything between reading src and writing dst happens in registers. The two operators
`zokern::pass_` and `zokern::pass_out` carry mutation annotations and fakes, so functions that call a pass compile
under torch.compile(fullgraph=True).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zokern import _checks, backends, directions
from zokern.contract.rules import Rule, rule_called
from zokern.directions import Direction
from zokern.passes.spec import MAX_CHAIN_SEEDS, MAX_PASS_SEEDS, MAX_STAGES, Chain, PassNumbers, PassSpec
from zokern.passes.table import Table, tables

_REST = (
    "Tensor(b!)[] first, Tensor(c!)[] second, int[] tensor_ids, int[] offsets, int[] groups, Tensor seeds, "
    "Tensor coefs, Tensor shared, Tensor? rounding_seed, Tensor? enabled, str rule, str distribution, str rounding, "
    "bool square_of_sum, bool keep_second, str backend"
)
_library = torch.library.Library("zokern", "DEF")
_library.define(f"pass_(Tensor(a!)[] tensors, {_REST}) -> ()")
_library.define(f"pass_out(Tensor[] src, Tensor(a!)[] dst, {_REST}) -> ()")


def _check_pairs(src: Sequence[Tensor], dst: Sequence[Tensor], ids: Sequence[int], offsets: Sequence[int]) -> None:
    for name, tensors in (("tensors", src), ("out", dst)) if dst is not src else (("tensors", src),):
        for i, t in enumerate(tensors):
            _checks.check_tensor(t, f"{name}[{i}]")
    for i, (s, d) in enumerate(zip(src, dst, strict=True)):
        if s.device != src[0].device:
            raise ValueError(
                f"tensors[{i}] is on {s.device} and tensors[0] on {src[0].device}; make one call per device"
            )
        if d.shape != s.shape or d.dtype != s.dtype or d.device != s.device:
            raise ValueError(f"out[{i}] is {_checks.describe(d)}, unlike tensors[{i}], which is {_checks.describe(s)}")
    for i, (tensor_id, offset) in enumerate(zip(ids, offsets, strict=True)):
        _checks.check_integer(tensor_id, f"tensor_ids[{i}]", 0, _checks.MAX_TENSOR_ID)
        _checks.check_integer(offset, f"offsets[{i}]", 0, _checks.MAX_INDEX - src[i].numel())
    if torch.compiler.is_compiling():
        return  # addresses are not known yet; the operator looks when it runs
    # Two threads may take any two chunks at once, so no element may be written twice, nor read after it was written.
    written = sorted((d.data_ptr(), d.data_ptr() + d.nbytes, i) for i, d in enumerate(dst))
    for (_, end, i), (begin, _, j) in itertools.pairwise(written):
        if begin < end:
            raise ValueError(
                f"{'out' if dst is not src else 'tensors'}[{i}] and [{j}] share memory; pass each tensor once"
            )
    if dst is not src:
        spans = sorted(
            [(s.data_ptr(), s.data_ptr() + s.nbytes, i, "tensors") for i, s in enumerate(src)]
            + [(begin, end, i, "out") for begin, end, i in written]
        )
        for (begin, end, i, what), (begin2, end2, j, what2) in itertools.pairwise(spans):
            if begin2 < end and what != what2 and (begin, end, i) != (begin2, end2, j):
                raise ValueError(
                    f"{what}[{i}] and {what2}[{j}] overlap; out must be apart from tensors, or the same memory"
                )


def _check_states(src: Sequence[Tensor], states: Sequence[Sequence[Tensor]]) -> None:
    for state in states:
        for s, t in zip(src, state, strict=True):
            fits = t.shape == s.shape and t.device == s.device and t.is_contiguous()
            if not fits or t.dtype != state[0].dtype or t.dtype not in _checks.DTYPES:
                raise ValueError(
                    f"a state is {_checks.describe(t)}, its tensor {_checks.describe(s)}: a state is contiguous, on the "
                    "same device, of the same shape, and float32, float16 or bfloat16 like the others"
                )


@dataclass(eq=False)
class Operands:
    """The tensors of passes on one device, and what has been found out about them.

    dst None works in place. states: of the rule, a list each. probes: where a forked chain's last stage goes, None for
    those that it leaves out. Who runs passes on the same operands again holds the tensors meanwhile and says so when
    anything about them changes (by making others): addresses take long to ask for.
    """

    src: list[Tensor]
    dst: list[Tensor] | None
    states: Sequence[list[Tensor]]
    tensor_ids: list[int]
    offsets: list[int]
    groups: list[int]
    probes: Sequence[Tensor | None] = ()
    _found: tuple[ModuleType, list[Table]] | None = None
    _written: list[Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.src[0].device

    def find(self, backend: str) -> tuple[ModuleType, list[Table]]:
        """The backend and the tables. Backends see addresses only, so everything must be right before they are called.

        Raises:
            TypeError, ValueError: naming the tensor that a pass cannot work on, when it is first seen.
        """
        if self._found is None:
            chosen = backends.choose(backend, self.device)
            dst = self.src if self.dst is None else self.dst
            found, _ = tables(
                self.src, dst, self.tensor_ids, self.offsets, self.groups, self.check, self.states, self.probes
            )
            self._found = chosen, found
        return self._found

    def check(self) -> None:
        _check_pairs(self.src, self.src if self.dst is None else self.dst, self.tensor_ids, self.offsets)
        _check_states(self.src, self.states)
        given = [(t, probe) for t, probe in zip(self.src, self.probes, strict=bool(self.probes)) if probe is not None]
        if given:
            _check_pairs([t for t, _ in given], [probe for _, probe in given], [0] * len(given), [0] * len(given))

    def tell_autograd(self) -> None:
        """That the values have changed."""
        if self._written is None:
            self._written = [t for t in (self.src if self.dst is None else self.dst) if not t.is_inference()]
        torch.autograd.graph.increment_version(self._written)


def run(operands: Operands, spec: PassSpec, numbers: PassNumbers, backend: str = "auto") -> int:
    """One pass, with one row of coefs and shared a group; one launch for each dtype, whose number is returned.

    Tensors are checked when they are first seen; numbers are the caller's to check.

    Raises:
        ValueError: for more seeds or more elements than one launch takes.
    """
    if numbers.seeds.numel() > MAX_PASS_SEEDS:
        raise ValueError(
            f"a pass has {numbers.seeds.numel()} seeds, and one takes {MAX_PASS_SEEDS}: give them to several passes in turn"
        )
    if _looked_at():
        return _through_torch(operands, spec, numbers, backend)
    launches = _launch(operands, spec, numbers, backend)
    operands.tell_autograd()
    return launches


def _launch(operands: Operands, spec: PassSpec, numbers: PassNumbers, backend: str) -> int:
    chosen, found = operands.find(backend)
    numbers = numbers.near(chosen, operands.device)
    for table in found:
        chosen.run(table, spec.of(table.dtype), numbers)
    return len(found)


def run_chain(
    operands: Operands,
    stages: Sequence[tuple[PassSpec, PassNumbers]],
    rule: Rule,
    *,
    enabled: Tensor | None = None,
    backend: str = "auto",
) -> int:
    """Several passes in place, one after another in registers (passes/spec.py's Chain): memory moves once.

    The operands' probes: the last stage, a perturbation, goes to these and not to the tensors. The bits are those of the
    passes done one by one. Returns the number of launches, one for each dtype.

    Raises:
        ValueError: unless there are 1 to 32 stages with at most 128 seeds in all; for more elements than a launch takes.
    """
    num_seeds = sum(numbers.seeds.numel() for _, numbers in stages)
    if not 1 <= len(stages) <= MAX_STAGES or num_seeds > MAX_CHAIN_SEEDS:
        raise ValueError(
            f"a chain has {len(stages)} stages with {num_seeds} seeds, and one takes 1 to {MAX_STAGES} stages with at most "
            f"{MAX_CHAIN_SEEDS}: make several chains of it, or passes (the bits are the same)"
        )
    chosen, found = operands.find(backend)
    for table in found:
        own = [(spec.of(table.dtype), numbers) for spec, numbers in stages]
        chosen.run_chain(table, Chain(own, rule, bool(operands.probes), enabled))
    operands.tell_autograd()
    return len(found)


# ----------------------------------------------------------------------------------------------------- torch.library


def _looked_at() -> bool:
    """Whether somebody sees a call only if it goes through PyTorch's dispatcher: a compiler, a mode, the profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.profiler._is_profiler_enabled
    )


def _through_torch(operands: Operands, spec: PassSpec, numbers: PassNumbers, backend: str) -> int:
    """The pass as an operator, to which records go as what operators take: tensors, lists and plain values."""
    first, second = [*operands.states, [], []][:2]
    rest = (
        first, second, operands.tensor_ids, operands.offsets, operands.groups, numbers.seeds, numbers.coefs, numbers.shared,
        numbers.rounding_seed, numbers.enabled, spec.rule.name, spec.direction.name, spec.rounding, spec.square_of_sum,
        spec.keep_second, backend,
    )  # fmt: skip
    if operands.dst is None:
        torch.ops.zokern.pass_(operands.src, *rest)
    else:
        torch.ops.zokern.pass_out(operands.src, operands.dst, *rest)
    if not torch.compiler.is_compiling():
        operands.tell_autograd()
    return len({t.dtype for t in operands.src})


def _operator(
    src: list[Tensor],
    dst: list[Tensor] | None,
    first: list[Tensor],
    second: list[Tensor],
    tensor_ids: list[int],
    offsets: list[int],
    groups: list[int],
    seeds: Tensor,
    coefs: Tensor,
    shared: Tensor,
    rounding_seed: Tensor | None,
    enabled: Tensor | None,
    rule: str,
    distribution: str,
    rounding: str,
    square_of_sum: bool,
    keep_second: bool,
    backend: str,
) -> None:
    """What `_through_torch` took apart, together again."""
    operands = Operands(src, dst, [state for state in (first, second) if state], tensor_ids, offsets, groups)
    spec = PassSpec(rule_called(rule), directions.parse(distribution), rounding, square_of_sum, keep_second)
    numbers = PassNumbers(seeds.contiguous(), coefs.contiguous(), shared.contiguous(), rounding_seed, enabled)
    _launch(operands, spec, numbers, backend)


def _pass_(tensors: list[Tensor], *args: Any) -> None:
    _operator(tensors, None, *args)


def _pass_out(src: list[Tensor], dst: list[Tensor], *args: Any) -> None:
    _operator(src, dst, *args)


def _fake(*args: object) -> None:
    """Nothing is returned and no shape changes."""


for _key in ("CPU", "CUDA"):
    _library.impl("pass_", _pass_, _key)
    _library.impl("pass_out", _pass_out, _key)
torch.library.register_fake("zokern::pass_", _fake, lib=_library)
torch.library.register_fake("zokern::pass_out", _fake, lib=_library)


# ---------------------------------------------------------------------------------------------------- add_noise_


def _seed_tensor(seeds: Sequence[int] | Tensor) -> Tensor:
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise TypeError(f"seeds must be a 1-D int64 tensor or a list of ints, got {_checks.describe(seeds)}")
        if seeds.device.type == "cpu" and not torch.compiler.is_compiling() and bool((seeds < 0).any()):
            raise ValueError(f"seeds has a negative value; seeds are in [0, {_checks.MAX_SEED}]")
        return seeds
    return torch.tensor([_checks.check_seed(s, f"seeds[{k}]") for k, s in enumerate(seeds)], dtype=torch.int64)


def _coef_tensor(coefs: Sequence[float] | Tensor) -> Tensor:
    if isinstance(coefs, Tensor):
        if coefs.dtype != torch.float32 or coefs.dim() != 1:
            raise TypeError(f"coefs must be a 1-D float32 tensor or a list of floats, got {_checks.describe(coefs)}")
        if coefs.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(coefs.isfinite().all()):
            raise ValueError("coefs has a value that is not finite")
        return coefs
    return torch.tensor(
        [
            _checks.check_number(c, f"coefs[{k}]", -_checks.MAX_FLOAT32, _checks.MAX_FLOAT32)
            for k, c in enumerate(coefs)
        ],
        dtype=torch.float32,
    )


def _same_memory(src: Sequence[Tensor], dst: Sequence[Tensor]) -> bool:
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(src, dst, strict=True))


def add_noise_(
    tensors: Sequence[Tensor],
    *,
    tensor_ids: Sequence[int],
    seeds: Sequence[int] | Tensor,
    coefs: Sequence[float] | Tensor,
    decay: float | Tensor = 1.0,
    distribution: str | Direction = "normal",
    rounding: str = "nearest",
    rounding_seed: int | None = None,
    out: Sequence[Tensor] | None = None,
    offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """dst <- round(decay*src + sum_k coefs[k] z(seeds[k])), all tensors in one launch for each dtype.

    Arithmetic is float32: one multiply by decay, one fused multiply-add for each direction in order, one rounding to the
    storage type. The result is the same bits on every backend (docs/noise.md).

    Args:
        tensors: float32, float16 or bfloat16, contiguous, on one device. Changed in place unless `out` is given.
        tensor_ids: one for each tensor, in [0, 2^32): which noise it gets.
        seeds: of the K >= 0 directions, ints in [0, 2^63), or an int64 tensor [K] on the host or the device.
        coefs: one for each seed, finite, or a float32 tensor [K].
        decay: finite, or a float32 tensor with one element.
        distribution: "normal" for N(0, 1), "rademacher" for random signs; or zokern.Normal(), zokern.Rademacher().
        rounding: "nearest" (even) or "stochastic" (unbiased; 16-bit tensors only, float32 has nothing to round).
        rounding_seed: of the stochastic rounding, in [0, 2^63). Give every rounding event its own.
        out: where the results go, shaped like `tensors`; None means in place.
        offsets: global index of each tensor's first element, for shards; None means zeros.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; $ZOKERN_BACKEND sets what "auto" means.

    Raises:
        TypeError, ValueError: before anything is changed, naming the argument, the tensor and the remedy.
        RuntimeError: when the backend asked for cannot run there, with the reason.

    No allocation grows with the tensors, and nothing waits for the device.
    """
    if isinstance(tensors, Tensor):
        raise TypeError("tensors must be a list of tensors; for one tensor t pass [t]")
    src = list(tensors)
    if not src:
        raise ValueError("tensors is empty: there is nothing to add noise to")
    dst = None if out is None else list(out)
    if dst is not None and len(dst) == len(src) and _same_memory(src, dst):
        dst = None
    ids, starts = list(tensor_ids), [0] * len(src) if offsets is None else list(offsets)
    for name, given in (("tensor_ids", ids), ("offsets", starts), ("out", dst)):
        if given is not None and len(given) != len(src):
            raise ValueError(
                f"{name} has {len(given)} entries and tensors has {len(src)}; one for each tensor is needed"
            )
    _check_pairs(src, src if dst is None else dst, ids, starts)
    device = src[0].device
    seed_tensor, coef_tensor = _seed_tensor(seeds), _coef_tensor(coefs)
    if seed_tensor.shape != coef_tensor.shape:
        raise ValueError(
            f"seeds has {seed_tensor.numel()} entries and coefs has {coef_tensor.numel()}; they go in pairs"
        )
    if isinstance(decay, Tensor):
        if decay.dtype != torch.float32 or decay.numel() != 1:
            raise TypeError(
                f"decay must be a number or a float32 tensor with one element, got {_checks.describe(decay)}"
            )
        decays = decay.reshape(1)
    else:
        decays = torch.tensor(
            [_checks.check_number(decay, "decay", -_checks.MAX_FLOAT32, _checks.MAX_FLOAT32)], dtype=torch.float32
        )
    for name, t in (("seeds", seed_tensor), ("coefs", coef_tensor), ("decay", decays)):
        if t.device.type != "cpu" and t.device != device:
            raise ValueError(f"{name} is on {t.device}, tensors on {device}; put it there or on the CPU")
        if t.device.type != "cpu" and device.type == "cpu":
            raise ValueError(f"{name} is on {t.device}, tensors on the CPU")
    spec = PassSpec(direction=directions.parse(distribution), rounding=rounding)
    if (rounding == "stochastic") != (rounding_seed is not None):
        raise ValueError(
            f"rounding is {rounding!r} and rounding_seed is {rounding_seed}; stochastic rounding needs a seed of its own, "
            "and nearest takes none"
        )
    rounding_tensor = None
    if rounding_seed is not None:
        rounding_tensor = torch.tensor([_checks.check_seed(rounding_seed, "rounding_seed"), 0], dtype=torch.int64)
    numbers = PassNumbers(seed_tensor, coef_tensor.reshape(1, 1, -1), decays.reshape(1, 1), rounding_tensor)
    with torch.no_grad():
        run(Operands(src, dst, [], ids, starts, [0] * len(src)), spec, numbers, backend)

"""Shards of a matrix along its last dimension: a pass over all of them has the bits of the pass over the whole.

The whole goes through the reference, as one contiguous tensor; its shards through each backend, with their strides.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import zokern
from tests import devices
from tests.launching import launch, launch_chain
from tests.pairs import by_backend, each, label
from zokern import sweep
from zokern.backends import native
from zokern.contract.rules import RULES
from zokern.directions import DIRECTIONS
from zokern.passes import table
from zokern.passes.operands import Operands
from zokern.passes.spec import PassNumbers, PassSpec, rule_of_probes

CHUNK, F32, F16, BF16 = table.CHUNK, torch.float32, torch.float16, torch.bfloat16
RULE = pytest.mark.parametrize("rule", RULES)
CHAINED = [rule for rule in RULES if rule != "scaled_axpy"]
# Widths: a multiple of 8, one, and others. 97 columns put each row at another place of a block of eight; with 96 and
# widths that are multiples of 8, all rows are aligned.
ODD, EVEN = (0, 24, 25, 64, 97), (0, 8, 40, 96)
CPU = torch.device("cpu")
Cuts = Sequence[tuple[slice, slice]]


def columns(cuts: Sequence[int], rows: int) -> Cuts:
    return [(slice(0, rows), slice(a, b)) for a, b in itertools.pairwise(cuts)]


@dataclass
class Whole:
    """A matrix with what a rule keeps of it, and where its shards are cut."""

    w: Tensor
    states: list[Tensor]
    tensor_id: int
    offset: int
    group: int
    cuts: Cuts
    off: int = 0  # shards lie so many elements off a 16-byte boundary

    def shards(self, t: Tensor, device: torch.device) -> list[Tensor]:
        """Each as local memory has it, with memory around it that must stay."""
        return [guarded(t[cut], self.off + self.starts[i] % 8, device) for i, cut in enumerate(self.cuts)]

    @property
    def starts(self) -> list[int]:
        return [self.offset + rows.start * self.w.shape[1] + cols.start for rows, cols in self.cuts]


def guarded(values: Tensor, off: int, device: torch.device) -> Tensor:
    room = torch.full((values.numel() + 32,), 7.0, dtype=values.dtype, device=device)
    start = (-room.data_ptr() % 16) // room.element_size() + off
    shard = room[start : start + values.numel()].view(values.shape)
    shard.copy_(values)
    return shard


def stays(shard: Tensor) -> bool:
    """Nothing was written around it."""
    room = shard.as_strided((shard.numel() + 32,), (1,), 0)
    return bool(
        (room[: shard.storage_offset()] == 7).all() & (room[shard.storage_offset() + shard.numel() :] == 7).all()
    )


def wholes(
    rule: str, dtype: torch.dtype, state: torch.dtype, *, rows: int = 5, offset: int = CHUNK - 200
) -> list[Whole]:
    """One whose rows lie anywhere, one whose rows are aligned, in another group, and one that is off by an element."""
    g = torch.Generator().manual_seed(5)
    found = []
    for n, cuts in enumerate((ODD, EVEN, EVEN)):
        shape = rows, cuts[-1]
        states = [(torch.rand(shape, generator=g) + 0.5).to(state) for _ in RULES[rule].states]
        w = torch.randn(shape, generator=g).to(dtype)
        found.append(Whole(w, states, 2**32 - 1 - n, offset + 8 * n, n % 2, columns(cuts, rows), off=n // 2))
    return found


def numbers(rule: str, k: int, salt: int = 0) -> PassNumbers:
    g = torch.Generator().manual_seed(100 * salt + k)
    coefs = torch.randn(2, len(RULES[rule].coefs), k, generator=g) * 0.1
    if "V" in RULES[rule].coefs:
        coefs[:, -1] = coefs[:, -1].abs()
    shared = torch.rand(2, len(RULES[rule].scalars), generator=g) * 0.5 + 0.5
    seeds = torch.randint(0, 1 << 62, (k + 2,), generator=g)
    return PassNumbers(seeds[:k], coefs, shared, seeds[k:])


def expected_of(some: list[Whole], spec: PassSpec, told: PassNumbers) -> list[tuple[Tensor, list[Tensor]]]:
    """The pass over the whole matrices, by the reference."""
    done = [(m.w.clone(), [s.clone() for s in m.states]) for m in some]
    states = [[kept[i] for _, kept in done] for i in range(len(some[0].states))]
    ids, offsets, groups = [m.tensor_id for m in some], [m.offset for m in some], [m.group for m in some]
    sweep.run(Operands([w for w, _ in done], None, states, ids, offsets, groups), spec, told, "reference")
    return done


def check(
    some: list[Whole],
    spec: PassSpec,
    told: PassNumbers,
    backend: str,
    device: torch.device,
    *,
    out: bool = False,
    calls: bool = False,
) -> None:
    """calls: one for each shard, instead of one for all."""
    expected = expected_of(some, spec, told)
    kept = [([*m.shards(m.w, device)], [m.shards(s, device) for s in m.states]) for m in some]
    src = [shard for shards, _ in kept for shard in shards]
    states = [[t for _, all_ in kept for t in all_[i]] for i in range(len(some[0].states))]
    before = [t.clone() for t in src]
    where = [(m.tensor_id, start, m.group, m.w.shape[1]) for m in some for start in m.starts]
    dst = [guarded(torch.zeros_like(t), t.storage_offset() % 8, device) for t in src] if out else None
    for at in [[i] for i in range(len(src))] if calls else [list(range(len(src)))]:
        ids, offsets, groups, strides = map(list, zip(*(where[i] for i in at), strict=True))
        operands = Operands(
            [src[i] for i in at], None if dst is None else [dst[i] for i in at], [[s[i] for i in at] for s in states],
            ids, offsets, groups, strides=strides,
        )  # fmt: skip
        sweep.run(operands, spec, told, backend)
    want = [w[cut] for m, (w, _) in zip(some, expected, strict=True) for cut in m.cuts]
    for i, (result, wanted) in enumerate(zip(src if dst is None else dst, want, strict=True)):
        assert torch.equal(result.cpu(), wanted), (i, "weights")
        assert stays(result), i
        assert dst is None or torch.equal(src[i], before[i])
    for n, state in enumerate(states):
        want = [all_[n][cut] for m, (_, all_) in zip(some, expected, strict=True) for cut in m.cuts]
        for i, (result, wanted) in enumerate(zip(state, want, strict=True)):
            assert torch.equal(result.cpu(), wanted), (i, "state", n)
            assert stays(result), i
    assert not all(torch.equal(t.cpu(), b.cpu()) for t, b in zip(src if dst is None else dst, before, strict=True))


def spec_of(rule: str, distribution: str = "normal", rounding: str = "nearest", **flags: bool) -> PassSpec:
    return PassSpec(RULES[rule], DIRECTIONS[distribution], rounding, **flags)


# ------------------------------------------------------------------------------------------------------------- passes


BY_BACKEND = pytest.mark.parametrize(
    ("backend", "rule", "dtype"), by_backend(list(RULES), [F32, F16, BF16], slow=each), indirect=["backend"], ids=label
)


@BY_BACKEND
def test_shards_have_the_bits_of_the_whole(rule: str, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    state = BF16 if RULES[rule].states == ("h",) and dtype == BF16 else F32
    rounding = "nearest" if dtype == F16 else "stochastic"
    check(wholes(rule, dtype, state), spec_of(rule, rounding=rounding), numbers(rule, 1), backend, device)


@RULE
def test_in_several_calls_and_out_of_place(rule: str, backend: str, device: torch.device) -> None:
    some, told = wholes(rule, F16, F32, rows=2)[: 1 if backend in devices.SLOW else 3], numbers(rule, 2)
    check(some, spec_of(rule, rounding="stochastic"), told, backend, device, calls=True)
    check(some, spec_of(rule), told, backend, device, out=True)


@BY_BACKEND
def test_signs_and_squares_of_sums(rule: str, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    some = wholes(rule, dtype, F32, rows=3)[: 1 if backend in devices.SLOW else 3]
    flags = {"square_of_sum": "V" in RULES[rule].coefs, "keep_second": RULES[rule].written == 2}
    check(some, spec_of(rule, "rademacher", **flags), numbers(rule, 3), backend, device)


@pytest.mark.parametrize(
    ("backend", "offset", "dtype"),
    by_backend([0, 5, 2**32 - 130, 2**36 + 3, 2**45 - 1000], [F32, F16, BF16], slow=each), indirect=["backend"], ids=label,
)  # fmt: skip
def test_offsets_of_the_whole(offset: int, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Beyond 2^32 and 2^35, where the counter's words wrap around, and up to the last index that there is."""
    some = wholes("axpy", dtype, F32, offset=offset)
    check(some, spec_of("axpy", rounding="stochastic"), numbers("axpy", 1), backend, device)


@RULE
@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set(rule: str) -> None:
    for dtype, rounding, k in ((BF16, "stochastic", 2), (F16, "nearest", 1), (F32, "nearest", 1)):
        check(wholes(rule, dtype, F32), spec_of(rule, rounding=rounding), numbers(rule, k), "cpu", CPU)


def test_rows_of_more_than_a_chunk(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Whole tiles of every backend, aligned and not, cut at the ends of rows and of chunks."""
    if backend in devices.SLOW:
        pytest.skip("its interpreter takes minutes; test_ptx.py runs the compiled kernels")
    g = torch.Generator().manual_seed(8)
    for wide, cuts in ((40_000, (0, 17_000, 20_000, 40_000)), (21_001, (0, 18_123, 21_001))):
        whole = torch.randn(3, wide, generator=g).to(dtype)
        some = [Whole(whole, [], 3, 2 * CHUNK - 8, 0, columns(cuts, 3))]
        check(some, spec_of("axpy", rounding="stochastic"), numbers("axpy", 1), backend, device)
        check(some, spec_of("axpy", "rademacher"), numbers("axpy", 2), backend, device)


def test_rows_and_columns(backend: str, device: torch.device) -> None:
    """Split along both dimensions."""
    whole = wholes("adam", BF16, F32, rows=7)[0]
    cuts = list(itertools.product((slice(0, 3), slice(3, 4), slice(4, 7)), (slice(0, 40), slice(40, 97))))
    check([replace(whole, cuts=cuts)], spec_of("adam", rounding="stochastic"), numbers("adam", 1), backend, device)


def test_a_shard_of_a_shard(backend: str, device: torch.device) -> None:
    """Columns 24..88 of a matrix, of which columns 16..48: neighbouring rows stay as far apart as the whole's."""
    whole = wholes("axpy", BF16, F32)[0]
    inner = [(slice(1, 5), slice(24 + 16, 24 + 48))]
    check([replace(whole, cuts=inner)], spec_of("axpy"), numbers("axpy", 1), backend, device)


def test_more_dimensions(backend: str, device: torch.device) -> None:
    """The last dimension is cut; all before it count as rows. Another dimension's shard is a view of two."""
    g = torch.Generator().manual_seed(2)
    w, pass_ = torch.randn(3, 4, 30, generator=g), {"tensor_ids": [4], "seeds": [1, 2], "coefs": [0.5, 0.25]}
    whole = w.clone()
    zokern.add_noise_([whole], backend="reference", **pass_)
    last = w[..., 7:20].contiguous().to(device)
    zokern.add_noise_([last], offsets=[7], strides=[30], backend=backend, **pass_)
    assert torch.equal(last.cpu(), whole[..., 7:20])
    middle = w[:, 1:3].contiguous().to(device)
    zokern.add_noise_([middle.view(3, 60)], offsets=[30], strides=[120], backend=backend, **pass_)
    assert torch.equal(middle.cpu(), whole[:, 1:3])


# ------------------------------------------------------------------------------------------------------------- chains


def chain_of(rule: str, draw: random.Random, dtype: torch.dtype, fork: bool) -> list[tuple[PassSpec, PassNumbers]]:
    helper, distribution = rule_of_probes(RULES[rule]).name, draw.choice(["normal", "rademacher"])
    stages = []
    for i, name in enumerate([rule, rule, helper] if fork else [helper, rule, rule]):
        rounding = "stochastic" if dtype != F32 and draw.random() < 0.6 else "nearest"
        stages.append((spec_of(name, distribution, rounding), numbers(name, draw.choice([1, 2, 3]), i)))
    return stages


def check_chain(rule: str, dtype: torch.dtype, fork: bool, backend: str, device: torch.device) -> None:
    draw = random.Random(f"{rule} {dtype} {fork}")
    state = BF16 if rule.startswith("hizoo") and draw.random() < 0.5 else F32
    some, stages = wholes(rule, dtype, state, rows=3), chain_of(rule, draw, dtype, fork)
    if backend in devices.SLOW:
        some = some[:1]
    here = [(m.w.clone(), [s.clone() for s in m.states]) for m in some]
    there = [torch.zeros_like(m.w) for m in some]
    for i, (spec, told) in enumerate(stages):
        last = fork and i == len(stages) - 1
        launch(
            [w for w, _ in here], there if last else None, tensor_ids=[m.tensor_id for m in some],
            offsets=[m.offset for m in some], groups=[m.group for m in some], seeds=told.seeds, coefs=told.coefs,
            shared=told.shared, rounding_seed=told.rounding_seed, rule=spec.rule.name, distribution=spec.direction.name,
            rounding=spec.rounding, states=[[kept[n] for _, kept in here] for n in range(len(spec.rule.states))],
            backend="reference",
        )  # fmt: skip
    parts = [m.shards(m.w, device) for m in some]
    states = [[t for m in some for t in m.shards(m.states[n], device)] for n in range(len(RULES[rule].states))]
    zeros = [m.shards(torch.zeros_like(m.w), device) for m in some] if fork else []
    probes = [None if i == 1 else t for i, t in enumerate(t for shards in zeros for t in shards)]
    got = [t for shards in parts for t in shards]
    launch_chain(
        got, stages, tensor_ids=[m.tensor_id for m in some for _ in m.cuts],
        offsets=[start for m in some for start in m.starts], groups=[m.group for m in some for _ in m.cuts], rule=rule,
        states=states, probes=probes, strides=[m.w.shape[1] for m in some for _ in m.cuts], backend=backend,
    )  # fmt: skip

    def compare(results: Sequence[Tensor | None], matrices: list[Tensor]) -> None:
        wanted = [t[cut] for m, t in zip(some, matrices, strict=True) for cut in m.cuts]
        for i, (result, want) in enumerate(zip(results, wanted, strict=True)):
            if result is not None:
                assert torch.equal(result.cpu(), want), i
                assert stays(result), i

    compare(got, [w for w, _ in here])
    for n, state_of_all in enumerate(states):
        compare(state_of_all, [kept[n] for _, kept in here])
    if fork:
        compare(probes, there)
    assert not torch.equal(got[0].cpu(), some[0].w[some[0].cuts[0]])


@pytest.mark.parametrize(
    ("backend", "rule", "dtype", "fork"),
    by_backend(CHAINED, [F32, F16, BF16], [False, True], slow=each), indirect=["backend"], ids=label,
)  # fmt: skip
def test_a_chain(rule: str, fork: bool, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    check_chain(rule, dtype, fork, backend, device)


@pytest.mark.parametrize("isa", native.extension.cpu_instruction_sets()[1:] if native.extension else ())
@pytest.mark.parametrize("rule", ["axpy", "hizoo_restore", "helene"])
def test_a_chain_on_every_instruction_set(
    isa: str, rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOKERN_CPU_ISA", isa)
    check_chain(rule, dtype, True, "cpu", CPU)


# ------------------------------------------------------------------------------------------------------- what is public


def test_add_noise_of_several_tensors_and_dtypes(backend: str, device: torch.device) -> None:
    """Some are strided."""
    g = torch.Generator().manual_seed(4)
    whole, other = torch.randn(6, 50, generator=g).to(BF16), torch.randn(3, 11, generator=g)
    pass_ = {"seeds": [3], "coefs": [0.5], "rounding": "stochastic", "rounding_seed": 9, "backend": backend}
    cuts = [(0, 16), (16, 17), (17, 50)]
    got = [other.to(device), *(whole[:, a:b].contiguous().to(device) for a, b in cuts)]
    zokern.add_noise_(got, tensor_ids=[8, 7, 7, 7], offsets=[0, 1000, 1016, 1017], strides=[0, 50, 50, 50], **pass_)
    pass_["backend"] = "reference"
    zokern.add_noise_([whole, other], tensor_ids=[7, 8], offsets=[1000, 0], **pass_)
    assert torch.equal(got[0].cpu(), other)
    assert torch.equal(torch.cat(got[1:], 1).cpu(), whole)


def test_noise_of_a_shard(backend: str, device: torch.device) -> None:
    whole = zokern.noise((9, 40), seed=3, tensor_id=5, offset=100, backend="reference")
    for a, b in ((0, 8), (8, 9), (9, 40)):
        shard = zokern.noise((9, b - a), seed=3, tensor_id=5, offset=100 + a, stride=40, backend=backend, device=device)
        assert torch.equal(shard.cpu(), whole[:, a:b])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"strides": [5, 0]}, ValueError, r"strides\[0\] is 5 for tensors\[0\], which is \(3, 6\) float32 on cpu: .* 6 ap"),
        ({"strides": [-1, 0]}, ValueError, r"strides\[0\] is -1; it must be in \[0, "),
        ({"strides": [8.0, 0]}, TypeError, r"strides\[0\] must be an int, got float"),
        ({"strides": [8, 4]}, ValueError, r"strides\[1\] is 4 for tensors\[1\], which is \(4,\) .*: a stride is betw"),
        ({"strides": [8]}, ValueError, r"strides has 1 entries and tensors has 2"),
        ({"strides": []}, ValueError, r"strides has 0 entries and tensors has 2"),
        ({"strides": [1 << 44, 0]}, ValueError, r"strides\[0\] is 17592186044416 .*: its 3 rows go beyond index 35184372"),
        ({"strides": [8, 0], "offsets": [(1 << 45) - 21, 0]}, ValueError, r"offsets\[0\] is 35184372088811; it must be in"),
    ],
)  # fmt: skip
def test_bad_strides_are_refused(given: dict, error: type[Exception], message: str) -> None:
    tensors = [torch.ones(3, 6), torch.ones(4)]
    with pytest.raises(error, match=message):
        zokern.add_noise_(tensors, tensor_ids=[0, 1], seeds=[1], coefs=[1.0], **given)
    assert torch.equal(tensors[0], torch.ones(3, 6))


def test_the_last_index_that_there_is() -> None:
    w = torch.ones(3, 6)
    zokern.add_noise_([w], tensor_ids=[0], seeds=[1], coefs=[1.0], strides=[8], offsets=[(1 << 45) - 22])
    assert not torch.equal(w, torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"strides\[0\] is 3 for"):
        zokern.noise((2, 4), seed=1, stride=3)


def test_members_of_a_sweep(backend: str, device: torch.device) -> None:
    """One of two is a strided shard; in passes and in a chain with probes."""
    whole = wholes("momentum", F32, F32)[0]
    spec, told = spec_of("momentum"), numbers("momentum", 1)
    forked = [(spec, told), (spec_of("axpy"), numbers("axpy", 2, 1))]

    def members(w: Tensor, m: Tensor, offset: int, stride: int, on: torch.device) -> list[sweep.Member]:
        bias = torch.linspace(-1, 1, 11, device=on)
        return [
            sweep.Member(w.to(on), 4, 1, "w", {"m": m.to(on)}, offset=offset, stride=stride),
            sweep.Member(bias, 5, 0, "b", {"m": torch.ones_like(bias)}),
        ]

    cut = slice(25, 64)
    results = []
    for w, m, offset, stride, on, name in (
        (whole.w.clone(), whole.states[0].clone(), 1000, 0, CPU, "reference"),
        (whole.w[:, cut].contiguous(), whole.states[0][:, cut].contiguous(), 1025, 97, device, backend),
    ):
        swept = sweep.Sweep(members(w, m, offset, stride, on))
        passes = sweep.Passes(DIRECTIONS["normal"], name)
        passes.run(swept, spec, told)
        probes = [torch.zeros_like(member.param) for member in swept]
        passes.chain(swept, forked, RULES["momentum"], probes=probes)
        results.append([swept[0].param, swept[0].states["m"], probes[0], swept[1].param, probes[1]])
    for i, (want, got) in enumerate(zip(*results, strict=True)):
        assert torch.equal(want[:, cut] if i < 3 else want, got.cpu()), i


def test_compiles_as_one_graph() -> None:
    start = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))

    def step(w: Tensor) -> Tensor:
        zokern.add_noise_([w], tensor_ids=[3], seeds=[5], coefs=[0.5], offsets=[8], strides=[64], backend="cpu")
        return w * 2

    plain, compiled, unlike = start.clone(), start.clone(), start.clone()
    expected = step(plain)
    assert torch.equal(torch.compile(step, fullgraph=True)(compiled), expected)
    assert torch.equal(compiled, plain)
    zokern.add_noise_([unlike], tensor_ids=[3], seeds=[5], coefs=[0.5], offsets=[8], backend="cpu")
    assert not torch.equal(unlike, plain)


def test_the_operator() -> None:
    """Strides come last, after what graphs recorded earlier give, and may be left out."""
    w = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    arguments = (
        [], [], [3], [8], [0], torch.tensor([5]), torch.tensor([[[0.5]]]), torch.tensor([[1.0]]), None, None, "axpy",
        "normal", "nearest", False, False, "cpu",
    )  # fmt: skip
    for rest, strides in (((), None), ((0,), None), ((0, [64]), [64])):
        expected, got = w.clone(), w.clone()
        zokern.add_noise_([expected], tensor_ids=[3], seeds=[5], coefs=[0.5], offsets=[8], strides=strides)
        torch.ops.zokern.pass_([got], *arguments, *rest)
        assert torch.equal(got, expected)
        torch.library.opcheck(torch.ops.zokern.pass_, ([got], *arguments, *rest))
    out = torch.empty_like(w)
    torch.ops.zokern.pass_out([w], [out], *arguments, 0, [64])
    assert torch.equal(out, expected)


# ------------------------------------------------------------------------------------------------------------ the table


def test_a_table_has_a_row_for_each_local_row() -> None:
    t, state, other = torch.zeros(3, 200, dtype=BF16), torch.zeros(3, 200), torch.zeros(7, dtype=BF16)
    both, kept = [other, t], [torch.zeros(7), state]
    stride = CHUNK + 50
    built = table.build(both, both, [9, 4], [0, CHUNK - 100], [0, 1], [kept], [None, t], strides=[0, stride])
    at, its = t.data_ptr(), state.data_ptr()
    rows = built.tensors[:, [*range(table.ALIGNED), *range(table.SRC, table.COLUMNS)]].tolist()
    assert rows == [
        [7, 0, 9, 0, other.data_ptr(), other.data_ptr(), kept[0].data_ptr(), 0, 0],
        [200, CHUNK - 100, 4, 1, at, at, its, 0, at],
        [200, CHUNK - 100 + stride, 4, 1, at + 400, at + 400, its + 800, 0, at + 400],
        [200, CHUNK - 100 + 2 * stride, 4, 1, at + 800, at + 800, its + 1600, 0, at + 800],
    ]
    assert built.chunks.tolist() == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 3]]
    assert (built.numel, built.groups) == (607, 2)


def test_rows_that_follow_each_other_are_one() -> None:
    t, single = torch.zeros(300, 64), torch.zeros(1, 1000)
    for w, stride in ((t, 64), (single, 5000), (single, 0)):
        built = table.build([w], [w], [0], [0], [0], strides=[stride])
        assert built.tensors[:, [table.NUMEL, table.SRC]].tolist() == [[w.numel(), w.data_ptr()]]
        assert built.chunks.shape[0] == -(-w.numel() // CHUNK)


def test_tables_are_told_apart_by_strides() -> None:
    w = torch.zeros(4, 8)
    found = [table.tables([w], [w], [0], [0], [0], strides=s)[0] for s in ((), [16], [32], [0], [16])]
    assert found[0] is found[3]
    assert found[1] is found[4]
    assert len({id(tables) for tables in found}) == 3


@pytest.mark.parametrize(
    ("dtype", "width", "stride", "aligned"),
    [
        (BF16, 16, 40, [1, 1, 1]), (BF16, 16, 44, [1, 0, 1]), (F32, 16, 44, [1, 1, 1]), (F32, 16, 42, [1, 0, 1]),
        (BF16, 17, 41, [1, 1, 1]), (BF16, 17, 40, [1, 0, 0]),
    ],
)  # fmt: skip
def test_each_row_is_aligned_or_not(dtype: torch.dtype, width: int, stride: int, aligned: list[int]) -> None:
    w = torch.zeros(3 * width, dtype=dtype).view(3, width)
    assert w.data_ptr() % 16 == 0
    assert table.build([w], [w], [0], [0], [0], strides=[stride]).tensors[:, table.ALIGNED].tolist() == aligned
    moved = table.build([w], [w], [0], [1], [0], strides=[stride]).tensors[:, table.ALIGNED]
    assert moved[0] == 0
    # What is 16-byte aligned of the weights may not be of a state, or of a probe.
    room = torch.zeros(3 * width + 1)
    for on, kept in ((0, 1), (1, 0)):
        state = room[on : on + 3 * width].view(3, width)
        found = table.build([w], [w], [0], [0], [0], [[state]], strides=[stride]).tensors[:, table.ALIGNED]
        assert bool(found.any()) == bool(kept)

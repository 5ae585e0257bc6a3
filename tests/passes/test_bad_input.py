"""Bad input: an error that names the argument and the remedy, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zokern
from tests.launching import launch, launch_chain
from zokern import backends, sweep
from zokern.passes import table
from zokern.passes.spec import AXPY, PassNumbers

GOOD = {"tensor_ids": [0, 1], "seeds": [1], "coefs": [0.5]}
CASES = {
    "integer tensor": (
        {"tensors": [torch.zeros(3), torch.zeros(3, dtype=torch.int32)]},
        TypeError,
        r"tensors\[1\].*int32",
    ),
    "float64 tensor": ({"tensors": [torch.zeros(3), torch.zeros(3, dtype=torch.float64)]}, TypeError, "float64"),
    "not a tensor": ({"tensors": [torch.zeros(3), [1.0]]}, TypeError, r"tensors\[1\].*list"),
    "one tensor": ({"tensors": torch.zeros(3)}, TypeError, r"pass \[t\]"),
    "empty list": ({"tensors": [], "tensor_ids": []}, ValueError, "tensors is empty"),
    "zero-size tensor": ({"tensors": [torch.zeros(3), torch.zeros(0)]}, ValueError, r"tensors\[1\].*no elements"),
    "transposed": (
        {"tensors": [torch.zeros(3), torch.zeros(3, 4).t()]},
        ValueError,
        r"tensors\[1\].*strides.*contiguous",
    ),
    "expanded": ({"tensors": [torch.zeros(3), torch.zeros(1).expand(4)]}, ValueError, r"tensors\[1\].*strides"),
    "meta device": ({"tensors": [torch.zeros(3), torch.zeros(3, device="meta")]}, ValueError, r"tensors\[1\].*meta"),
    "sparse": ({"tensors": [torch.zeros(3), torch.zeros(3).to_sparse()]}, ValueError, r"tensors\[1\].*layout"),
    "same tensor twice": ({"tensors": [X := torch.zeros(3), X]}, ValueError, "share memory"),
    "overlapping views": ({"tensors": [(Y := torch.zeros(9))[:5], Y[4:]]}, ValueError, "share memory"),
    "ids too short": ({"tensor_ids": [0]}, ValueError, "tensor_ids has 1 entries and tensors has 2"),
    "id negative": ({"tensor_ids": [0, -1]}, ValueError, r"tensor_ids\[1\] is -1"),
    "id too large": ({"tensor_ids": [0, 1 << 32]}, ValueError, r"tensor_ids\[1\]"),
    "id not an int": ({"tensor_ids": [0, 1.0]}, TypeError, r"tensor_ids\[1\]"),
    "seed negative": ({"seeds": [-1]}, ValueError, r"seeds\[0\] is -1"),
    "seed too large": ({"seeds": [1 << 63]}, ValueError, r"seeds\[0\]"),
    "seed a bool": ({"seeds": [True]}, TypeError, r"seeds\[0\].*bool"),
    "seed tensor of int32": ({"seeds": torch.tensor([1], dtype=torch.int32)}, TypeError, "seeds.*int64"),
    "seed tensor negative": ({"seeds": torch.tensor([-5])}, ValueError, "seeds has a negative"),
    "coefs and seeds differ": ({"coefs": [0.5, 0.5]}, ValueError, "seeds has 1 entries and coefs has 2"),
    "coef NaN": ({"coefs": [float("nan")]}, ValueError, r"coefs\[0\] is nan"),
    "coef infinite": ({"coefs": [float("inf")]}, ValueError, r"coefs\[0\] is inf"),
    "coef beyond float32": ({"coefs": [1e39]}, ValueError, r"coefs\[0\] is 1e\+39; it must be in"),
    "coef a string": ({"coefs": ["1"]}, TypeError, r"coefs\[0\].*str"),
    "coef tensor NaN": ({"coefs": torch.tensor([float("nan")])}, ValueError, "coefs"),
    "coef tensor float64": ({"coefs": torch.tensor([0.5], dtype=torch.float64)}, TypeError, "coefs.*float32"),
    "decay NaN": ({"decay": float("nan")}, ValueError, "decay is nan"),
    "decay tensor of two": ({"decay": torch.ones(2)}, TypeError, "decay"),
    "distribution": ({"distribution": "uniform"}, ValueError, "distribution is 'uniform'.*'normal', 'rademacher'"),
    "rounding": ({"rounding": "up"}, ValueError, "rounding is 'up'"),
    "stochastic without a seed": ({"rounding": "stochastic"}, ValueError, "rounding_seed"),
    "seed without stochastic": ({"rounding_seed": 3}, ValueError, "rounding_seed"),
    "rounding seed out of range": ({"rounding": "stochastic", "rounding_seed": -1}, ValueError, "rounding_seed is -1"),
    "out too short": ({"out": [torch.zeros(3)]}, ValueError, "out has 1 entries"),
    "out of another shape": ({"out": [torch.zeros(3), torch.zeros(5)]}, ValueError, r"out\[1\].*unlike tensors\[1\]"),
    "out of another dtype": ({"out": [torch.zeros(3), torch.zeros(4).half()]}, ValueError, r"out\[1\].*unlike"),
    "offset negative": ({"offsets": [0, -1]}, ValueError, r"offsets\[1\] is -1"),
    "offset too large": ({"offsets": [0, 1 << 45]}, ValueError, r"offsets\[1\]"),
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu'"),
    "backend that cannot run": ({"backend": "cuda"}, RuntimeError, "cuda.*CUDA tensors only"),
}


@pytest.mark.parametrize("case", CASES)
def test_add_noise_refuses(case: str) -> None:
    change, error, message = CASES[case]
    given = {"tensors": [torch.ones(3), torch.ones(4)], **GOOD, **change}
    tensors = given.pop("tensors")
    listed = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    plain = [t for t in listed if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.layout == torch.strided]
    before = [t.clone() for t in plain]
    with pytest.raises(error, match=message):
        zokern.add_noise_(tensors, **given)
    for t, b in zip(plain, before, strict=True):
        assert torch.equal(t, b)


def test_partial_overlap_of_out_and_tensors_is_refused() -> None:
    pool = torch.zeros(20)
    with pytest.raises(ValueError, match="overlap"):
        zokern.add_noise_([pool[:10]], out=[pool[5:15]], tensor_ids=[0], seeds=[1], coefs=[1.0])
    zokern.add_noise_([pool[:10]], out=[pool[10:]], tensor_ids=[0], seeds=[1], coefs=[1.0])
    zokern.add_noise_([pool[:10]], out=[pool[:10]], tensor_ids=[0], seeds=[1], coefs=[1.0])


def test_an_overlap_with_a_tensor_that_is_no_neighbour_is_refused() -> None:
    """Tensor 1 begins between tensor 0 and out 1, which overlap."""
    pool = torch.zeros(200)
    tensors, out = [pool[:100], pool[10:20]], [torch.zeros(100), pool[50:60]]
    with pytest.raises(ValueError, match=r"tensors\[0\] and out\[1\] overlap"):
        zokern.add_noise_(tensors, out=out, tensor_ids=[0, 1], seeds=[1], coefs=[1.0])
    assert not pool.any()


SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9), st.booleans()), min_size=1, max_size=5
)


@settings(max_examples=400, deadline=None)
@given(SPANS)
def test_overlaps_are_those_of_any_two(spans: list[tuple[int, int, int, bool]]) -> None:
    """By definition: no two of out share memory, and a tensor and one of out only if they are the same and go together."""
    pool = torch.zeros(64)
    pairs = [(range(a, a + n), range(a, a + n) if same else range(b, b + n)) for a, b, n, same in spans]
    meet = [
        (i != j and set(out) & set(other_out)) or (set(src) & set(other_out) and (i != j or src != other_out))
        for i, (src, out) in enumerate(pairs)
        for j, (_, other_out) in enumerate(pairs)
    ]
    tensors, out = ([pool[r.start : r.stop] for r in side] for side in zip(*pairs, strict=True))
    arguments = {"tensor_ids": list(range(len(pairs))), "seeds": [1], "coefs": [1.0]}
    if any(meet):
        with pytest.raises(ValueError, match=r"overlap|share memory"):
            zokern.add_noise_(tensors, out=out, **arguments)
        assert not pool.any()
    else:
        zokern.add_noise_(tensors, out=out, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": 0}, ValueError, r"shape\[0\] is 0"),
        ({"shape": (2, -1)}, ValueError, r"shape\[1\] is -1"),
        ({"shape": (1 << 40, 1 << 40)}, ValueError, "shape"),
        ({"shape": 2.0}, TypeError, "shape"),
        ({"seed": -1}, ValueError, r"seeds\[0\]"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"distribution": "cauchy"}, ValueError, "distribution"),
    ],
)
def test_noise_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        zokern.noise(**{"shape": 3, "seed": 1, **change})


def test_the_environment_chooses_the_backend_and_errors_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOKERN_BACKEND", "reference")
    assert backends.choose("auto", torch.device("cpu")).__name__.endswith("reference")
    assert backends.choose("cpu", torch.device("cpu")).__name__.endswith("cpu"), "an argument beats the environment"
    monkeypatch.setenv("ZOKERN_BACKEND", "gpu")
    with pytest.raises(ValueError, match="ZOKERN_BACKEND is 'gpu'"):
        backends.choose("auto", torch.device("cpu"))


def test_every_refusal_has_a_reason() -> None:
    for reason in backends.explain("cpu").values():
        assert reason is None or len(reason) > 10
    with pytest.raises(RuntimeError, match="no kernels for device mps"):
        backends.choose("auto", torch.device("mps"))


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOKERN_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="ZOKERN_CPU_ISA is 'sse9'"):
        zokern.noise(3, seed=1, backend="cpu")


# ------------------------------------------------------------------------------------------------- limits of one launch


def numbers_of(seeds: int) -> PassNumbers:
    return PassNumbers(torch.arange(seeds), torch.ones(1, 1, seeds), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("stages", "seeds", "said"),
    [
        (33, 1, r"33 stages with 33 seeds, and one takes 1 to 32 stages"),
        (2, 65, r"2 stages with 130 seeds, .* at most 128: make several chains"),
        (0, 1, r"0 stages with 0 seeds, and one takes 1 to 32"),
    ],
)
def test_a_chain_refuses_more_than_it_takes(stages: int, seeds: int, said: str, backend, device) -> None:
    weight = torch.zeros(100, device=device)
    chain = [(AXPY, numbers_of(seeds))] * stages
    with pytest.raises(ValueError, match=said):
        launch_chain([weight], chain, tensor_ids=[0], offsets=[0], groups=[0], rule="axpy", backend=backend)
    assert not weight.any()


def test_a_chain_takes_what_its_limits_say() -> None:
    one = torch.zeros(100)
    for chain in ([(AXPY, numbers_of(4))] * 32, [(AXPY, numbers_of(64))] * 2):
        launch_chain([one], chain, tensor_ids=[0], offsets=[0], groups=[0], rule="axpy", backend="cpu")
    assert one.all()


def test_a_pass_refuses_more_seeds_than_it_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 * 2^30 coefficients, say, are more than kernels count to; nothing of that size is made for the message."""
    weight, seeds = torch.zeros(100), torch.zeros(1, dtype=torch.int64).expand(1 << 30)
    coefs = torch.zeros(1, 1, 1).expand(1, 1, 1 << 30)
    with pytest.raises(ValueError, match=r"1073741824 seeds, and one takes 715827882: give them to several passes"):
        launch([weight], None, tensor_ids=[0], offsets=[0], groups=[0], seeds=seeds, coefs=coefs, shared=coefs[0])
    monkeypatch.setattr(sweep, "MAX_PASS_SEEDS", 3)
    zokern.add_noise_([weight], tensor_ids=[0], seeds=[1, 2, 3], coefs=[1.0] * 3)
    before = weight.clone()
    with pytest.raises(ValueError, match=r"4 seeds, and one takes 3: give them to several passes"):
        zokern.add_noise_([weight], tensor_ids=[0], seeds=[1, 2, 3, 4], coefs=[1.0] * 4)
    assert torch.equal(weight, before)


def test_a_pass_refuses_more_chunks_than_a_grid_has_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tensors of 2^44 elements, which have no memory here; nothing of that size is made for the message."""
    weights = [torch.empty(1 << 44, device="meta") for _ in range(3)]
    with pytest.raises(ValueError, match=r"3221225472 chunks of 16384 elements, and one launch takes 2147483647: give"):
        table.build(weights, weights, [0, 1, 2], [0] * 3, [0] * 3)
    small = [torch.zeros(2) for _ in range(3)]
    given = {"tensor_ids": [0, 1, 2], "offsets": [(1 << 14) - 1] * 3, "seeds": [1], "coefs": [1.0]}  # two chunks each
    monkeypatch.setattr(table, "MAX_CHUNKS", 5)
    with pytest.raises(ValueError, match=r"6 chunks of 16384 elements, and one launch takes 5: give them in several"):
        zokern.add_noise_(small, **given)
    assert not any(t.any() for t in small)
    monkeypatch.setattr(table, "MAX_CHUNKS", 6)
    zokern.add_noise_(small, **given)
    assert all(t.all() for t in small)

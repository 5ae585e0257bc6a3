"""Bad input: an error that names the argument and the remedy, and nothing is changed."""

from __future__ import annotations

import pytest
import torch

import zokern
from zokern import backends

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

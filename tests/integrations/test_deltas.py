"""Quantised layers that are only read: their updates stay terms of low rank, and are saved as an adapter."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zokern
from zokern import journal
from zokern.contract.streams import derive_seed
from zokern.deltas import Delta
from zokern.hashing import hash_of

peft = pytest.importorskip("peft")
torchao = pytest.importorskip("torchao.quantization")
bitsandbytes = pytest.importorskip("bitsandbytes")
from zokern.integrations.peft import save_adapter  # noqa: E402

X = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
LOW = {"distribution": zokern.LowRank(2), "placement": "forward", "fold_every": 0, "eps": 1e-2, "seed": 5}


def plain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).to(dtype).eval()


def by_torchao(config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = plain(torch.bfloat16)
        torchao.quantize_(model, config())
        return model

    return build


def eight_bits() -> nn.Module:
    source, model = plain(), plain()
    for i in (0, 2):
        one: Any = source[i]
        model[i] = bitsandbytes.nn.Linear8bitLt(one.in_features, one.out_features, has_fp16_weights=False)
        model[i].load_state_dict(one.state_dict())
    return model.to("cpu")


def four_bits() -> nn.Module:
    source, model = plain(), plain()
    for i in (0, 2):
        one: Any = source[i]
        layer: Any = bitsandbytes.nn.Linear4bit(one.in_features, one.out_features, quant_type="nf4")
        layer.load_state_dict(one.state_dict())
        layer.support_avx512bf16_for_cpu = False
        model[i] = layer
    return model.to("cpu")


BASES = {
    "int8": by_torchao(torchao.Int8WeightOnlyConfig),
    "float8": by_torchao(torchao.Float8WeightOnlyConfig),
    "bnb8": eight_bits,
    "bnb4": four_bits,
}


def ready(base: str) -> nn.Module:
    model = BASES[base]().requires_grad_(False)
    assert zokern.add_deltas(model) == ["0", "2"]
    return model


def dtype_of(base: str) -> torch.dtype:
    return torch.bfloat16 if base in ("int8", "float8") else torch.float32


def loss_of(model: nn.Module, base: str) -> Callable[[], Tensor]:
    return lambda: functional.mse_loss(model(X.to(dtype_of(base))).float(), Y)


def run(model: nn.Module, base: str, steps: int, **options: Any) -> Any:
    opt = zokern.MeZO(model, 1e-2, **{**LOW, **options})
    for _ in range(steps):
        opt.step(loss_of(model, base))
    return opt


@pytest.mark.parametrize("base", BASES)
def test_a_fine_tune_that_peft_loads(base: str, tmp_path: Path) -> None:
    untouched = hash_of(BASES[base]().state_dict().items())
    model = ready(base)
    loss = loss_of(model, base)
    with torch.no_grad():
        before = float(loss())
        opt = run(model, base, 6)
        with opt.folded():
            wanted = float(loss())
        assert float(loss()) == before
    assert abs(wanted - before) > 1e-3
    assert hash_of(model.state_dict().items()) == untouched
    assert save_adapter(opt, tmp_path) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's: of merging, which nobody asks for
        loaded = peft.PeftModel.from_pretrained(BASES[base](), str(tmp_path)).eval()
    with torch.no_grad():
        bound = 1e-5 if base == "bnb4" else 5e-3  # bnb8 rounds what it is given to 8 bits, too
        assert float(loss_of(loaded, base)()) == pytest.approx(wanted, rel=bound)


def test_probes_see_base_and_thin_products() -> None:
    """y = layer(x) + x (sum_k c_k z_k)^T with the z that zokern.noise gives, for each probe and for what waits."""
    model = ready("bnb8")
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(model[0](X))
        return functional.mse_loss(seen[-1][:, :32], Y)

    opt = zokern.MeZO(model, 1e-2, **LOW)
    opt.step(closure)
    opt.step(closure)
    with torch.no_grad():
        base = model[0](X)
    (first,) = opt._placement.pending.seeds[:1]
    name = next(i for i, (n, _) in enumerate(model.named_parameters()) if n == "0.delta")
    seeds = [derive_seed(5, step, 0) for step in range(2)]
    assert first == seeds[0]
    z = [zokern.noise((96, 64), seed=seed, tensor_id=name, distribution="lowrank:2") for seed in seeds]
    c = float(opt._placement.pending.coefs[0, 0])
    for out, coefs in zip(seen, ((1e-2, 0.0), (-1e-2, 0.0), (c, 1e-2), (c, -1e-2)), strict=True):
        total = sum(a * one.double() for a, one in zip(coefs, z, strict=True))
        assert torch.allclose(out.double(), base.double() + X.double() @ total.T, rtol=0, atol=2e-6)


def test_it_takes_no_memory_and_is_in_no_state_dict() -> None:
    model = ready("int8")
    assert [p.untyped_storage().nbytes() for p in model.parameters() if isinstance(p, Delta)] == [4, 4]
    assert list(model.state_dict()) == list(BASES["int8"]().state_dict())
    assert not model.load_state_dict(model.state_dict()).missing_keys
    assert zokern.add_deltas(model) == ["0", "2"]  # again: nothing new
    for base in ("int8", "bnb4"):  # torchao's layers cannot be pickled
        model = ready(base)
        other = copy.deepcopy(model) if base == "int8" else pickle.loads(pickle.dumps(model))
        assert [p.untyped_storage().nbytes() for p in other.parameters() if isinstance(p, Delta)] == [4, 4]
        a, b = run(model, base, 2), run(other, base, 2)
        assert torch.equal(a._placement.pending.coefs, b._placement.pending.coefs)
        assert base == "bnb4" or not other.load_state_dict(model.state_dict()).missing_keys


def test_a_run_goes_on_from_its_state_and_from_its_journal(tmp_path: Path) -> None:
    whole = run(ready("int8"), "int8", 5)
    model = ready("int8")
    first = zokern.MeZO(model, 1e-2, **LOW)
    with journal.write(first, tmp_path / "run.zkj"):
        for _ in range(3):
            first.step(loss_of(model, "int8"))
    by_state = zokern.MeZO(model, 1e-2, **LOW)
    by_state.load_state_dict(first.state_dict())
    other = ready("int8")
    by_journal = zokern.MeZO(other, 1e-2, **LOW)
    with journal.resume(by_journal, tmp_path / "run.zkj"):
        for opt, one in ((by_state, model), (by_journal, other)):
            for _ in range(2):
                opt.step(loss_of(one, "int8"))
    for opt in (by_state, by_journal):
        assert opt.pending == 5
        assert torch.equal(opt._placement.pending.coefs, whole._placement.pending.coefs)
    assert journal.replay(tmp_path / "run.zkj", ready("int8"), fold=False).verified
    with pytest.raises(RuntimeError, match="save_adapter"):
        journal.replay(tmp_path / "run.zkj", ready("int8"), fold=True)
    another = BASES["int8"]()
    another[0] = nn.Linear(64, 96).to(torch.bfloat16)
    torchao.quantize_(another[0], torchao.Int8WeightOnlyConfig())
    zokern.add_deltas(another.requires_grad_(False))
    with pytest.raises(journal.JournalError, match="base"):
        journal.replay(tmp_path / "run.zkj", another)


@pytest.mark.parametrize("base", ["int8", "bnb8"])
def test_all_directions_in_one_forward(base: str) -> None:
    found = []
    for batched in (True, 1):
        model = ready(base)

        def closure(batch: Any, model: nn.Module = model) -> Tensor:
            out = model(batch["x"].to(dtype_of(base))).float()
            return functional.mse_loss(out, batch["y"], reduction="none").mean(dim=1)

        opt = zokern.FZOO(model, 1e-3, candidates=4, **LOW)
        for _ in range(3):
            loss = opt.step(closure, [{"x": X, "y": Y}], batched=batched)
        assert int(opt.metrics["probes_per_forward"]) == (5 if batched is True else 1)
        found.append(float(loss))
    assert found[0] == pytest.approx(found[1], rel=5e-3 if base == "int8" else 2e-5)


def test_autocast_and_a_compiled_model() -> None:
    model = ready("bnb8")
    torch._dynamo.reset()
    for kind in ("autocast", "compiled"):
        one = torch.compile(model, backend="eager") if kind == "compiled" else model
        opt = zokern.MeZO(model, 1e-2, **LOW)
        other = zokern.MeZO(model, 1e-2, **LOW)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                a = opt.step(lambda one=one: functional.mse_loss(one(X).float(), Y))
            b = other.step(loss_of(model, "bnb8"))
            assert float(a) == pytest.approx(float(b), rel=2e-2 if kind == "autocast" else 1e-5)


def test_they_are_float32_under_any_default_dtype() -> None:
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = BASES["bnb8"]().requires_grad_(False)
        torch.set_default_dtype(dtype)
        try:
            zokern.add_deltas(model)
            opt = run(model, "bnb8", 2)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(opt._placement.pending.coefs)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_layers_by_name() -> None:
    model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}) if _has_engine() else plain()
    assert zokern.add_deltas(model, ["2"]) == ["2"]
    model.requires_grad_(False)
    model[2].delta.requires_grad_()
    opt = zokern.MeZO(model, 1e-2, **LOW)
    before = float(functional.mse_loss(model(X), Y))
    for _ in range(8):
        opt.step(lambda: functional.mse_loss(model(X), Y))
    with opt.folded(), torch.no_grad():
        assert float(functional.mse_loss(model(X), Y)) < before


def _has_engine() -> bool:
    return any(engine != "none" for engine in torch.backends.quantized.supported_engines)


@pytest.mark.parametrize(("options", "match"), [
    ({"fold_every": 1}, r"0.delta has no memory.*fold_every=0"),
    ({"fold_every": 4}, r"0.delta has no memory.*fold_every=0"),
    ({"placement": "shadow", "fold_every": 1}, r"0.delta has no memory.*placement='forward'"),
    ({"distribution": zokern.LowRank(40)}, r"2.delta is \(32, 96\).*lower rank"),
])  # fmt: skip
def test_what_would_write_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        zokern.MeZO(ready("int8"), 1e-2, **{**LOW, **options})


def test_other_uses_are_refused(tmp_path: Path) -> None:
    model = ready("int8")
    opt = run(model, "int8", 2)
    with pytest.raises(RuntimeError, match=r"0.delta has no memory.*save_adapter"):
        opt.fold()
    assert opt.pending == 2
    with pytest.raises(RuntimeError, match=r"values of 0.delta.*add_deltas"):
        opt.step(lambda: loss_of(model, "int8")() + model[0].delta.sum())
    assert opt.pending == 2
    with pytest.raises(TypeError, match="model must be an nn"):
        zokern.add_deltas([nn.Linear(2, 2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no linear layer with a quantised weight"):
        zokern.add_deltas(plain())
    with pytest.raises(ValueError, match="has no module '7'"):
        zokern.add_deltas(plain(), ["0", "7"])
    with pytest.raises(TypeError, match=r"give \['0'\]"):
        zokern.add_deltas(plain(), "0")
    with pytest.raises(
        ValueError, match=r"no module 'linear1'; give whole names, as in named_modules\(\): layers.0.linear1, layers"
    ):
        zokern.add_deltas(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 8), 5, enable_nested_tensor=False), ["linear1"]
        )
    with pytest.raises(ValueError, match="'1' is a Tanh"):
        zokern.add_deltas(plain(), ["1"])
    with pytest.raises(ValueError, match="modules is empty"):
        zokern.add_deltas(plain(), [])
    own = plain()
    own[0].delta = 3
    with pytest.raises(ValueError, match="0 has a delta of its own"):
        zokern.add_deltas(own, ["0"])


def test_what_is_trained_is_said_without_the_layers_that_have_deltas(capsys: pytest.CaptureFixture[str]) -> None:
    run(ready("bnb8"), "bnb8", 1)
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("base", ["int8", "bnb8"])
def test_check_says_that_they_react(base: str) -> None:
    model = ready(base)
    result = zokern.check(zokern.MeZO(model, 1e-2, **LOW), loss_of(model, base))
    assert result.ok, str(result)
    assert [row.name for row in result.rows if row.state == "reacts"] == ["0.delta", "2.delta"]
    assert result.cost.passes == {"forward": 0}
    assert result.cost.weights == 0
    assert {name for name, size in result.cost.memory.items() if size is not None} == {"forward"}

"""zokern.scales: what it finds in quantised models, that steps on it move their forwards and no code, what it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zokern
from zokern.optim import causes
from zokern.scales import keep_codes

quantization = pytest.importorskip("torchao.quantization")
bnb = pytest.importorskip("bitsandbytes")

X = torch.linspace(-1, 1, 4 * 64).view(4, 64)
FOUR_BITS = {"quant_type": "nf4", "compress_statistics": False}


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)).eval()


def ao(config: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = plain().to(dtype)
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def bits(layer: str, packs: bool = False, **options: object) -> nn.Module:
    """bitsandbytes' layers. packs: as on a CPU with AVX512-BF16, after a forward."""
    model = plain()
    for i in (0, 2):
        new = getattr(bnb.nn, layer)(64, 64, **options)
        new.load_state_dict(model[i].state_dict())
        model[i] = new
    model = model.to("cpu").eval()
    for i in (0, 2):
        if hasattr(model[i], "support_avx512bf16_for_cpu"):
            model[i].support_avx512bf16_for_cpu = packs
    if packs:
        loss(model)
    return model


KINDS: dict[str, tuple[Callable[[], nn.Module], str, torch.dtype]] = {
    "torchao int8": (lambda: ao("Int8WeightOnlyConfig"), "scale", torch.float32),
    "torchao int8 of bfloat16": (lambda: ao("Int8WeightOnlyConfig", torch.bfloat16), "scale", torch.float32),
    "torchao float8": (lambda: ao("Float8WeightOnlyConfig"), "scale", torch.float32),
    "bitsandbytes 8": (lambda: bits("Linear8bitLt", has_fp16_weights=False), "SCB", torch.float32),
    "bitsandbytes 4": (lambda: bits("Linear4bit", **FOUR_BITS), "absmax", torch.float32),
    "bitsandbytes 4, packed": (lambda: bits("Linear4bit", packs=True, **FOUR_BITS), "absmax", torch.bfloat16),
    "bitsandbytes 4, doubly, packed": (lambda: bits("Linear4bit", packs=True), "absmax", torch.bfloat16),
}


def codes(model: nn.Module) -> list[Tensor]:
    weights = [model[i].weight for i in (0, 2)]  # type: ignore[index]
    return [getattr(w, "qdata", w.data).clone() for w in weights]


def loss(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X.to(model[1].weight.dtype)).float().square().mean()  # type: ignore[index]


def rms(found: list[tuple[str, Tensor]]) -> float:
    return float(torch.stack([t.detach().float().square().mean() for _, t in found]).mean().sqrt())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_the_scales_move_the_model_and_no_code(kind: str) -> None:
    make, part, dtype = KINDS[kind]
    model = make()
    before, start = codes(model), loss(model)
    found = zokern.scales(model)
    assert [name for name, _ in found] == [f"0.weight.{part}", f"2.weight.{part}"]
    assert all(t.dtype == dtype and t.requires_grad and t.is_leaf for _, t in found)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in ("0.weight", "2.weight"))

    eps = rms(found) / 100
    opt = zokern.MeZO(found, lr=eps * eps, eps=eps)
    assert opt.placement == "inplace"
    values = [t.detach().clone() for _, t in found]
    for _ in range(3):
        opt.step(lambda: loss(model))
    assert opt.flat_steps == 0
    assert all(not torch.equal(t, value) for (_, t), value in zip(found, values, strict=True))
    with torch.no_grad():
        found[0][1].mul_(1.25)
    assert not torch.equal(loss(model), start)
    assert all(torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))

    again = zokern.scales(model)  # the same memory
    assert all(a.data_ptr() == b.data_ptr() for (_, a), (_, b) in zip(found, again, strict=True))
    with torch.no_grad():
        for (_, t), value in zip(found, values, strict=True):
            t.copy_(value)
    assert torch.equal(loss(model), start)


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_scales_is_in_a_journal(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = ao("Int8WeightOnlyConfig")
    base = {name: t.detach().clone() for name, t in zokern.scales(model)}
    opt = zokern.MeZO(zokern.scales(model), lr=1e-10, eps=1e-5)
    with zokern.journal.write(opt, tmp_path / "j.zkj"):
        opt.step(lambda: loss(model))
    zokern.journal.replay(tmp_path / "j.zkj", base)
    assert all(torch.equal(base[name], t) for name, t in zokern.scales(model))


@pytest.mark.filterwarnings("ignore")
def test_tied_weights_count_once() -> None:
    model = ao("Int8WeightOnlyConfig")
    model[2].weight = model[0].weight  # type: ignore[index]
    assert [name for name, _ in zokern.scales(model)] == ["0.weight.scale"]


class _Odd(Tensor):
    """A wrapper whose scales are something else than plain numbers of a pass."""

    @staticmethod
    def __new__(cls, parts: dict[str, Tensor]) -> _Odd:
        return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self.parts = list(parts)
        for name, t in parts.items():
            setattr(self, name, t)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return self.parts, None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], *_: object) -> _Odd:
        return cls(parts)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return args[0] if func is torch.ops.aten.detach.default else NotImplemented


def odd(**parts: Tensor) -> nn.Module:
    model = nn.Linear(4, 4)
    del model.weight
    model.register_parameter("weight", nn.Parameter(_Odd(parts), requires_grad=False))
    return model


def test_scales_that_no_pass_can_write_are_refused_by_name() -> None:
    for make, message in (
        (lambda: bits("Linear4bit"), r"0\.weight: its scales are quantised .*uint8.*compress_statistics=False"),
        (
            lambda: odd(qdata=torch.zeros(4), scale_and_zero=torch.zeros(4)),
            r"weight: a _Odd has no scales .*scale_and_zero",
        ),
        (lambda: odd(scale=torch.zeros(4, dtype=torch.float8_e8m0fnu)), r"weight\.scale has float8_e8m0fnu numbers"),
        (plain, r"Sequential has no quantised weights of torchao or bitsandbytes"),
    ):
        model = make()
        before = copy.deepcopy([t.clone() for t in model.state_dict().values() if type(t) is Tensor])
        with pytest.raises(ValueError, match=message):
            zokern.scales(model)
        after = [t for t in model.state_dict().values() if type(t) is Tensor]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        zokern.scales([])  # type: ignore[arg-type]


def test_scales_that_a_forward_will_replace_are_refused() -> None:
    model = bits("Linear4bit", **FOUR_BITS)
    model[0].support_avx512bf16_for_cpu = True  # type: ignore[index]
    with pytest.raises(ValueError, match=r"0\.weight: its next forward on this CPU replaces its scales.*model once"):
        zokern.scales(model)
    unquantised = nn.Sequential(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(ValueError, match=r"0\.weight: a Params4bit that is not quantised yet; move the model"):
        zokern.scales(unquantised)


@pytest.mark.filterwarnings("ignore")
def test_shadow_and_module_have_nothing_to_show_scales_to() -> None:
    model = ao("Int8WeightOnlyConfig")
    with pytest.raises(ValueError, match="placement='shadow' has to show the perturbed weights to a module"):
        zokern.MeZO(zokern.scales(model), lr=1e-3, placement="shadow")
    with pytest.raises(ValueError, match=r"'0\.weight\.scale' .* that is no parameter of module"):
        zokern.MeZO(zokern.scales(model), lr=1e-3, module=model)


# ------------------------------------------------------------------------------------------------ the rest of the model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("placement", ["inplace", "shadow"])
@pytest.mark.parametrize("kind", ["torchao int8", "torchao float8", "bitsandbytes 8", "bitsandbytes 4"])
def test_what_is_left_out_is_said_and_stays(
    kind: str, placement: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causes, "_announced", set())
    model = KINDS[kind][0]()
    before, scale = codes(model), [t.clone() for _, t in zokern.scales(model)]
    opt = zokern.MeZO(model, lr=1e-3, placement=placement)
    said = capsys.readouterr().err
    assert "256 of the 256 floating-point numbers of Sequential are trained; 2 quantised tensors are left out" in said
    assert "(0.weight, 2.weight): zokern.scales(model) has their scales" in said
    norm = model[1].weight.detach().clone()  # type: ignore[index]
    opt.step(lambda: loss(model))
    assert not torch.equal(model[1].weight, norm)  # type: ignore[index]
    assert all(torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))
    assert all(torch.equal(t, value) for (_, t), value in zip(zokern.scales(model), scale, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchaos_weights_are_in_a_journals_hash(config: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The base of a replay is the one with these codes and these scales."""
    model, twin, other = ao(config), ao(config), ao(config)
    opt = zokern.MeZO(model, lr=1e-3)
    with zokern.journal.write(opt, tmp_path / "j.zkj"):
        opt.step(lambda: loss(model))
    zokern.journal.replay(tmp_path / "j.zkj", twin)
    assert torch.equal(twin[1].weight, model[1].weight)  # type: ignore[index]
    with torch.no_grad():
        other[0].weight.scale[3] *= 2  # type: ignore[index]
    with pytest.raises(zokern.journal.JournalError, match="base"):
        zokern.journal.replay(tmp_path / "j.zkj", other)


def test_a_quantised_weight_that_asks_to_be_trained_is_refused_with_the_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ao("Int8WeightOnlyConfig")
    model[0].weight.requires_grad_(True)  # type: ignore[index]
    with pytest.raises(TypeError, match=r"0\.weight is a Int8Tensor.*requires_grad_\(False\); zokern\.scales\(model\)"):
        zokern.MeZO(model, lr=1e-3)


def test_codes_that_are_kept_stay_through_a_forward_and_a_checkpoint() -> None:
    """As on a CPU that packs: without it, state_dict() would leave other scales."""
    model = bits("Linear4bit", **FOUR_BITS)
    for i in (0, 2):
        model[i].support_avx512bf16_for_cpu = True  # type: ignore[index]
    keep_codes(model)
    before = codes(model), [model[i].weight.quant_state.absmax.clone() for i in (0, 2)]  # type: ignore[index]
    said = loss(model)
    model.state_dict()
    assert torch.equal(loss(model), said)
    after = codes(model), [model[i].weight.quant_state.absmax for i in (0, 2)]  # type: ignore[index]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))

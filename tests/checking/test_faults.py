"""A closure that does not react is found, also where only some of the tensors have no effect; each with its cause."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import models
from tests.checking.models import Int8Linear, Packed, engine, inputs, norms
from zokern.checking import verdict
from zokern.checking.result import NO_EFFECT, REACTS, Result


def loss(run, x):
    return lambda: run(x).float().square().mean()


def accused(result: Result) -> set[str]:
    return {row.name for row in result.rows if row.suspicious and row.state == NO_EFFECT}


def texts(result: Result) -> str:
    return " ".join(one.text for one in result.verdicts if one.suspicious)


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
@pytest.mark.parametrize(("name", "cause"), [
    ("deepcopy", "runs a copy"), ("averaged", "runs a copy"), ("older tensors", "older tensors"),
])  # fmt: skip
def test_copies(name: str, cause: str, placement: str) -> None:
    model = models.linear(16, 8, 4).eval()
    result = zokern.check(model, loss(engine(name, model, inputs()), inputs()), placement=placement)
    assert not result.ok
    assert len(result.without_effect) == result.looked_at == 4
    assert accused(result) == {name for name, _ in model.named_parameters()}
    assert "reacted to none of the tensors" in texts(result)
    assert cause in texts(result)


@pytest.mark.parametrize("name", ["trace", "export", "functional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_read_the_weights_and_shadow_shows_copies(name: str, dtype: torch.dtype) -> None:
    """In place all is well, which the remedy says. For 16-bit weights "auto" is shadow here."""
    model, x = norms(dtype), inputs(dtype)
    closure = loss(engine(name, model, x), x)
    placement = "shadow" if dtype == torch.float32 else "auto"
    result = zokern.check(model, closure, placement=placement)
    assert result.placement == "shadow"
    assert accused(result) == {name for name, _ in model.named_parameters()}
    assert "use placement='inplace'" in texts(result)
    assert zokern.check(model, closure, placement="inplace").without_effect == []


def test_a_traced_model_under_stream() -> None:
    model = models.seeded(models.Net)
    tokens = torch.arange(6).reshape(2, 3)
    closure = loss(engine("trace", model, tokens), tokens)
    result = zokern.check(model, closure, placement="stream")
    assert accused(result) == {name for name, _ in model.named_parameters()}
    blocks = [row for row in result.rows if row.name.startswith("layers")]
    assert all("the closure called no block" in row.why for row in blocks)
    assert all("use placement='inplace'" in row.why for row in result.rows)
    assert zokern.check(model, closure, placement="inplace").ok


def test_freezing_merges_equal_norms() -> None:
    model = norms()
    result = zokern.check(model, loss(engine("freeze", model, inputs()), inputs()), placement="inplace")
    assert accused(result) == {"norm2.weight", "norm2.bias"}
    assert "jit.freeze" in result.without_effect[0].why
    assert {row.state for row in result.rows if row.name not in accused(result)} == {REACTS}


def keeps_weights(graph: torch.fx.GraphModule, examples: list) -> object:
    """A backend that computes with the matrices as they were when it compiled."""
    kept = {i: t.detach().clone() for i, t in enumerate(examples) if isinstance(t, nn.Parameter) and t.dim() == 2}
    return lambda *given: graph(*(kept.get(i, t) for i, t in enumerate(given)))


def test_compiled_code_with_and_without_copies_of_its_own() -> None:
    model, x = norms(), inputs()
    torch._dynamo.reset()
    for placement in ("inplace", "shadow"):
        result = zokern.check(model, loss(torch.compile(model, backend=keeps_weights), x), placement=placement)
        assert accused(result) == {"first.weight", "second.weight", "head.weight"}
        assert all("freezing" in row.why for row in result.without_effect)
        assert zokern.check(model, loss(torch.compile(model, backend="eager"), x), placement=placement).ok
    model.forward = torch.compile(model.forward, backend=keeps_weights)
    assert len(accused(zokern.check(model, loss(model, x)))) == 3


@pytest.mark.slow
def test_inductors_freezing() -> None:
    """The matrices that it packs, and what it makes literals of; the rest is seen."""
    from torch._inductor import config

    model, x = norms(), inputs()
    torch._dynamo.reset()
    with config.patch(freezing=True):
        result = zokern.check(model, loss(torch.compile(model), x), placement="inplace", max_seconds=600.0)
    torch._dynamo.reset()
    assert accused(result) >= {"first.weight", "second.weight", "head.weight"}
    assert all("freezing" in row.why for row in result.without_effect)
    assert "norm.weight" not in accused(result)


def test_cached_parametrizations() -> None:
    model = norms()
    nn.utils.parametrizations.weight_norm(model.second)
    closure = loss(model, inputs())
    assert zokern.check(model, closure).ok
    with nn.utils.parametrize.cached():
        result = zokern.check(model, closure)
    assert accused(result) == {f"second.parametrizations.weight.original{i}" for i in (0, 1)}
    assert "parametrize.cached()" in result.without_effect[0].why


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_layer_through_mkldnn() -> None:
    """Its weights are buffers now: what is left trains, and is said not to be all."""
    from torch.utils.mkldnn import to_mkldnn

    model = norms()
    model.second = to_mkldnn(model.second)
    result = zokern.check(model, loss(model, inputs()))
    assert not result.ok
    assert {row.name for row in result.not_trained} == {"second.weight"}
    assert "second.weight cannot be trained" in texts(result)


def test_a_quantised_layer() -> None:
    model = norms()
    model.second = Int8Linear(model.second)
    result = zokern.check(model, loss(model, inputs()))
    assert "second.weight cannot be trained" in texts(result)
    assert accused(result) == set()
    for p in (*model.first.parameters(), *model.norm.parameters()):
        p.requires_grad_(False)  # whoever chooses what to train, as with LoRA, knows
    assert zokern.check(model, loss(model, inputs())).ok


def test_a_layer_of_torchs_quantisation() -> None:
    model = norms()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's deprecation
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    result = zokern.check(model, loss(model, inputs()))
    assert "first._packed_params" in texts(result)


def test_a_layer_that_keeps_a_packed_copy() -> None:
    model = norms()
    packed = Packed(16, 16)
    packed.load_state_dict(model.second.state_dict())
    model.second = packed.pack()
    result = zokern.check(model, loss(model, inputs()))
    assert accused(result) == {"second.weight"}
    assert "packed or quantised copy" in result.without_effect[0].why


def test_a_block_that_runs_as_an_engine_of_its_own() -> None:
    """The model runs, and one block in it as a frozen copy."""
    model = models.seeded(models.Net)
    x = torch.linspace(-1, 1, 48).reshape(2, 24)
    frozen = engine("freeze", copy.deepcopy(model.layers[1]), x)
    model.layers[1].forward = frozen.forward
    result = zokern.check(model, loss(model, torch.arange(6).reshape(2, 3)))
    assert accused(result) == {"layers.1.0.weight", "layers.1.0.bias"}
    assert "a module above it ran, and none inside that" in result.without_effect[0].why


def test_what_was_computed_before_the_step() -> None:
    model = norms()
    hidden = model.norm(model.first(inputs())).detach()
    closure = lambda: model.head(model.norm2(model.second(hidden))).square().mean()  # noqa: E731
    result = zokern.check(model, closure)
    assert {row.name for row in result.without_effect} == {
        f"{m}.{p}" for m in ("first", "norm") for p in ("weight", "bias")
    }
    whole = model(inputs()).square().mean()
    constant = zokern.check(model, lambda: whole)
    assert not constant.ok
    assert "kept from one call to the next" in texts(constant)


def test_a_step_function() -> None:
    model = norms()
    result = zokern.check(model, lambda: (model(inputs()).argmax(1) == 0).sum())
    assert not result.ok
    assert texts(result).split(": ", 1)[1].startswith("the loss, ")
    assert "a step function" in texts(result)


def test_a_sixteen_bit_loss() -> None:
    model = norms(torch.bfloat16)
    closure = lambda: model(inputs(torch.bfloat16)).square().mean()  # noqa: E731
    result = zokern.check(model, closure)
    assert "returns it in bfloat16" in texts(result)
    late = zokern.check(model, lambda: closure().float())
    assert "all losses are numbers of bfloat16" in texts(late)
    assert {row.why for row in late.without_effect if not row.suspicious} <= {verdict.COARSE}
    assert "bfloat16" in texts(zokern.check(model, lambda: closure().item()))
    remedied = zokern.check(model, lambda: model(inputs(torch.bfloat16)).float().square().mean())
    assert "bfloat16" not in texts(remedied)
    assert not any("16 bits" in row.why for row in remedied.rows)


def test_an_eps_that_the_weights_dtype_swallows() -> None:
    model = norms(torch.bfloat16)
    closure = loss(model, inputs(torch.bfloat16))
    result = zokern.check(model, closure, eps=1e-6)
    assert "eps z changes" in texts(result)
    assert result.moved[torch.bfloat16] < 0.1
    larger = zokern.check(model, closure, eps=1e-2)
    assert larger.ok, str(larger)
    assert larger.moved[torch.bfloat16] > 0.7


def test_dropout_is_named_and_tensors_are_judged_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    unused = nn.Linear(4, 4)
    model.unused = unused
    model.forward = lambda x: model[2](model[1](model[0](x)))
    result = zokern.check(model, loss(model, inputs()))
    assert not result.same_twice
    assert result.noise == 0.0
    assert "active dropout in 1; call model.eval()" in texts(result)
    assert {row.name for row in result.without_effect} == {"unused.weight", "unused.bias"}
    model.eval()
    assert zokern.check(model, loss(model, inputs())).ok


class Named(nn.Dropout):
    """By its name, as some models have their own."""


class ShareDropout(nn.Module):
    """Neither torch's nor with a share whose name says so."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self.training)


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: Named(0.5), "layer (Named)"),
        (ShareDropout, "layer"),
        (lambda: nn.RReLU(), "layer (RReLU)"),
        (lambda: nn.MultiheadAttention(8, 2, dropout=0.5), "layer (MultiheadAttention)"),
    ],
)
def test_what_draws_is_named_with_its_kind(made: Callable[[], nn.Module], named: str) -> None:
    """Also attention with a share of its own, which is no dropout by name. What is switched off is not."""
    model = nn.ModuleDict({"first": nn.Linear(16, 8), "off": nn.Dropout(0.0), "layer": made(), "last": nn.Linear(8, 4)})
    x = inputs()

    def closure() -> Tensor:
        h, layer = model["first"](x), model["layer"]
        h = layer(h, h, h)[0] if isinstance(layer, nn.MultiheadAttention) else layer(h)
        return model["last"](h).square().mean()

    result = zokern.check(model, closure)
    assert not result.same_twice
    assert f"active dropout in {named}; call model.eval()" in texts(result)
    model.eval()
    assert zokern.check(model, closure).same_twice


def test_noise_that_cannot_be_paired() -> None:
    """A generator of the closure's own: reactions are judged against the spread of eight."""
    model, generator = norms(), torch.Generator().manual_seed(0)
    closure = lambda: model(inputs()).square().mean() + 1e-3 * torch.rand((), generator=generator)  # noqa: E731
    result = zokern.check(model, closure)
    assert 1e-4 < result.noise < 1e-3
    assert "not the same function twice, also with equal random states" in texts(result)
    assert {row.state for row in result.rows} == {REACTS}  # some of them to a larger perturbation
    assert max(row.size for row in result.rows) > result.eps
    dead = zokern.check(model, lambda: torch.rand((), generator=generator))
    assert all(row.state == NO_EFFECT for row in dead.rows)


def test_another_batch_each_time() -> None:
    model = norms()
    batches = iter(inputs() * i for i in range(1, 1000))
    result = zokern.check(model, lambda: model(next(batches)).square().mean())
    assert "another batch each time" in texts(result)


def test_a_loss_that_is_not_finite() -> None:
    result = zokern.check(norms(), lambda: torch.tensor(float("nan")))
    assert not result.ok
    assert "the loss of the clean weights is nan" in texts(result)
    assert result.looked_at == 0


@pytest.mark.parametrize("what", ["merged", "disabled", "other"])
def test_adapters(what: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["first", "second"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(norms(), config)
    opt = zokern.MeZO(model, lr=1e-3)
    closure = loss(model, inputs())
    assert zokern.check(opt, closure).ok
    if what == "other":
        model.add_adapter("other", config)
        model.set_adapter("other")
        result = zokern.check(opt, closure)
        assert result.trainable == 0
        assert "no tensor is trained" in texts(result)
        whys = {row.why for row in result.not_trained if row.suspicious}
        assert any("frozen since" in why for why in whys)
        assert any("not in the optimizer" in why for why in whys)
        return
    if what == "merged":
        model.merge_adapter()
        result = zokern.check(opt, closure)
        model.unmerge_adapter()
        assert len(accused(result)) == 4
        assert "merged into the base weight" in texts(result)
    else:
        with model.disable_adapter():  # which freezes it too
            result = zokern.check(opt, closure)
        assert "no tensor is trained" in texts(result)
        assert all("adapter is disabled" in row.why for row in result.not_trained if row.suspicious)
    assert zokern.check(opt, closure).ok  # the remedy


def test_an_adapter_that_is_trained_beside_the_active_one() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["first"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(norms(), config)
    model.add_adapter("other", config)
    for p in model.parameters():
        p.requires_grad_("lora" in "".join(name for name, q in model.named_parameters() if q is p))
    result = zokern.check(model, loss(model, inputs()))
    assert {row.why for row in result.without_effect} == {"another adapter is active (default): set_adapter('other')"}


def test_a_model_that_has_changed_since() -> None:
    model = norms()
    opt = zokern.MeZO(model, lr=1e-3)
    model.head = nn.Linear(16, 3)
    result = zokern.check(opt, loss(model, inputs()))
    assert "the model no longer has head.weight, head.bias" in texts(result)
    assert {row.why.split(",")[0] for row in result.not_trained} == {"it is not in the optimizer"}
    assert zokern.check(zokern.MeZO(model, lr=1e-3), loss(model, inputs())).ok


def test_parameters_that_share_memory() -> None:
    flat = torch.ones(6)
    one, other = nn.Parameter(flat[:4]), nn.Parameter(flat[2:])
    result = zokern.check([one, other], lambda: one.sum() * other.sum())
    assert "share memory" in texts(result)
    apart = nn.Parameter(flat[4:])
    assert zokern.check([one, apart], lambda: one.sum() * apart.sum()).ok

"""placement="forward": products with a stand-in are those with the perturbed weight, by whatever module."""

from __future__ import annotations

import contextlib
import copy
import importlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint

import zokern
from tests.methods import METHODS, build, given
from tests.models import all_bits, bits, same_bits, seeded, small, tokens, toy
from zokern.contract import reference
from zokern.directions import LowRank
from zokern.placement import Forward, plus
from zokern.sweep import Member, Passes, Sweep

EPS = 0.03
TERMS = {11: 1.0}
THREE = {11: 1.0, 12: -0.5, 13: 0.25}


class Conv1D(nn.Module):
    """GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 20) * 0.3), nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 20)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(30, 12, padding_idx=2), nn.Linear(12, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids)))


class ReadElsewhere(nn.Module):
    """A weight that is used without its module, before and behind its module's own call."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], before: bool) -> None:
        super().__init__()
        self.inner, self.use, self.before = nn.Linear(12, 12), use, before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = self.use(x, self.inner.weight)
            return self.inner(x)
        return self.use(self.inner(x), self.inner.weight)


class Renormed(nn.Module):
    """Writes to its weight in its forward, as the old spectral norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.inner.weight.div_(self.inner.weight.norm())
        return self.inner(x)


class Routed(nn.Module):
    """Experts in a list, of which a batch calls some."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x) + self.experts[2](x[:0]).sum()


class Fused(nn.Module):
    """Experts in one tensor, [E, out, in] or with the sides turned; rows are sorted by expert."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.weight = way, nn.Parameter(0.3 * torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
        of = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3, 3])
        if self.way == "one":
            parts = [functional.linear(x[of == e], self.weight[e]) for e in (torch.tensor(0), 2, 3)]
            return torch.cat(parts)
        if self.way == "gathered":
            return torch.bmm(self.weight[of], x.unsqueeze(-1)).squeeze(-1)
        if self.way == "gathered, turned":
            return torch.bmm(x.unsqueeze(1), self.weight[of]).squeeze(1)
        if x.dtype == torch.float64:  # grouped_mm has no float64
            w = self.weight.mT if self.way == "turned" else self.weight
            return torch.bmm(x.unsqueeze(1), w[of]).squeeze(1)
        if self.way == "turned":
            return functional.grouped_mm(x, self.weight.transpose(-2, -1), offs=ends)
        return functional.grouped_mm(x, self.weight, offs=ends)


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def words(*shape: int) -> Tensor:
    return torch.randint(30, shape, generator=torch.Generator().manual_seed(1))


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# Each with its input, and how many matrices of it become copies.
MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: nn.Linear(12, 20), rows(7, 12), 0),
    "linear, one row": (lambda: nn.Linear(12, 20), rows(12), 0),
    "linear, no row": (lambda: nn.Linear(12, 20), rows(0, 12), 0),
    "linear without bias, strided input": (lambda: nn.Linear(12, 20, bias=False), rows(4, 12, 3).transpose(1, 2), 0),
    "Conv1D": (Conv1D, rows(2, 3, 12), 0),
    "embedding": (lambda: nn.Embedding(30, 12, padding_idx=2), words(2, 5), 0),
    "scaled embedding": (lambda: ScaledEmbedding(30, 12), words(2, 5), 0),
    "tied": (Tied, words(2, 5), 0),
    "other product": (lambda: ReadElsewhere(lambda x, w: x @ w.T, True), rows(7, 12), 0),
    "transposes": (lambda: ReadElsewhere(lambda x, w: torch.matmul(x, w.transpose(-1, 0).mT), False), rows(2, 7, 12), 0),
    "slices": (lambda: ReadElsewhere(lambda x, w: functional.linear(x, w[2:9]) @ w[:7], True), rows(7, 12), 0),
    "read before": (lambda: ReadElsewhere(lambda x, w: x * w.mean(dim=1), True), rows(7, 12), 1),
    "read behind": (lambda: ReadElsewhere(lambda x, w: x + w.square().sum(), False), rows(7, 12), 1),
    "a row": (lambda: ReadElsewhere(lambda x, w: x + w[3], False), rows(7, 12), 1),
    "part read": (lambda: ReadElsewhere(lambda x, w: x + w[3:5].sum() + w.mT.std(), False), rows(7, 12), 1),
    "as a matrix": (lambda: ReadElsewhere(lambda x, w: (w @ x.T).T, False), rows(7, 12), 1),
    "written to": (Renormed, rows(7, 12), 1),
    "max_norm": (lambda: nn.Embedding(30, 12, max_norm=0.5), words(2, 5), 0),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 20)), rows(7, 12), 1),
    "attention": (lambda: Attention(12, 2), rows(4, 2, 12), 2),
    "encoder": (lambda: nn.TransformerEncoderLayer(12, 2, 24), rows(4, 2, 12), 2),
    "LSTM": (lambda: Recurrent(12, 7), rows(4, 2, 12), 0),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(6, 5, 5), nn.Flatten(), nn.Linear(40, 4)), rows(2, 6, 12), 1),
    "routed": (Routed, rows(5, 12), 0),
    **{f"fused, {way}": (lambda way=way: Fused(way), rows(10, 16), 0) for way in ("one", "gathered", "gathered, turned")},
    **{f"fused, grouped {way}": (lambda way=way: Fused(way), rows(10, 16), 0) for way in ("turned", "as it is")},
}  # fmt: skip


@contextlib.contextmanager
def presented(
    module: nn.Module, rank: int = 1, terms: Mapping[Any, float] = TERMS, **options: Any
) -> Iterator[Forward]:
    placement = Forward(**options)
    placement.bind(module, Passes(LowRank(rank), "auto"))
    sweep = Sweep([Member(p, i, 0, name) for i, (name, p) in enumerate(module.named_parameters())])
    placement.begin(sweep, torch.tensor([EPS], dtype=torch.float64), scaled=False)
    try:
        with torch.no_grad(), placement.present(terms):
            yield placement
    finally:
        placement.end()


def noisy(module: nn.Module, rank: int, terms: Mapping[int, float], dtype: torch.dtype | None = None) -> nn.Module:
    """With the perturbed weights written out: by the contract, rounded once to `dtype`, or to that of each weight."""
    made = copy.deepcopy(module)
    for i, p in enumerate(made.parameters()):
        total = p.double()
        for seed, a in terms.items():
            z = reference.noise(p.numel(), seed, i, 0, f"lowrank:{rank}", tuple(p.shape))
            total = total + EPS * a * torch.from_numpy(z.copy()).view(p.shape)
        p.data = total.to(p.dtype if dtype is None else dtype)
    return made


def outputs(
    module: nn.Module, x: Tensor, rank: int, terms: Mapping[int, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Forward]:
    """Under forward, with weights written out, in float64, and without noise."""
    dtype = next(module.parameters()).dtype
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        clean = copy.deepcopy(module)(x)
        exact = noisy(module, rank, terms, torch.float64)(x.double() if x.is_floating_point() else x)
        rounded = noisy(module, rank, terms)(x)
    with presented(module, rank, terms) as placement:
        seen = module(x)
    return seen, rounded, exact, clean, placement


def error(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact.double()).square().sum().sqrt())


@pytest.mark.parametrize(
    ("rank", "terms"), [(1, TERMS), (3, TERMS), (1, THREE), (2, THREE)], ids=["1", "3", "1x3", "2x3"]
)
@pytest.mark.parametrize("name", MODULES)
def test_outputs_are_those_of_perturbed_weights(name, rank, terms, capfd):
    make, x, copied = MODULES[name]
    module = seeded(make)
    before = [p.detach().clone() for p in module.parameters()]
    seen, rounded, exact, clean, placement = outputs(module, x, rank, terms)
    assert seen.dtype == rounded.dtype
    assert seen.shape == rounded.shape
    assert error(seen, exact) <= 3 * error(rounded, exact) + 1e-7 * float(exact.norm())
    assert seen.numel() == 0 or error(clean, exact) > 1e-3 * float(exact.norm())
    assert len(placement.copied) == copied
    assert ("perturbs a copy" in capfd.readouterr().err) == bool(copied)
    assert all(type(p) is nn.Parameter for p in module.parameters())
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["linear", "Conv1D", "embedding", "tied", "transposes", "read before", "fused, one", "fused, grouped turned"],
)
def test_sixteen_bit_weights_see_more_of_a_direction_than_rounded_copies(name, dtype):
    make, x, _ = MODULES[name]
    seen, rounded, exact, clean, _ = outputs(seeded(make, dtype), x, 1, TERMS)
    assert seen.dtype == dtype
    assert error(seen, exact) <= 1.2 * error(rounded, exact)
    assert error(clean, exact) > 5 * error(seen, exact)


@pytest.mark.parametrize("name", ["linear", "Conv1D", "embedding", "tied", "transposes", "read before"])
def test_autocast(name):
    make, x, _ = MODULES[name]
    module = seeded(make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            rounded = noisy(module, 1, TERMS)(x)
        with presented(module):
            seen = module(x)
            assert torch.equal(seen, module(x))
    with torch.no_grad():
        exact = noisy(module, 1, TERMS, torch.float64)(x.double() if x.is_floating_point() else x)
    assert seen.dtype == rounded.dtype
    assert error(seen, exact) <= 1.5 * error(rounded, exact)


def test_a_written_out_sum_has_the_bits_of_a_pass():
    module = seeded(lambda: nn.Linear(12, 20))
    wanted = module.weight.detach().clone()
    zokern.add_noise_([wanted], tensor_ids=[0], seeds=[11], coefs=[EPS], distribution=LowRank(2))
    with presented(module, 2):
        assert torch.equal(module.weight + 0, wanted)
        assert torch.equal(module.weight[3], wanted[3])
        assert (module.weight.shape, module.weight.dtype, module.weight.device) == (
            (20, 12),
            torch.float32,
            wanted.device,
        )
        assert torch.equal(copy.deepcopy(module).weight, wanted)
        assert torch.equal(pickle.loads(pickle.dumps(module.weight)), wanted)
        assert torch.equal(functional.linear(wanted, module.weight), functional.linear(wanted, wanted))


# ------------------------------------------------------------------------------------------------------------------ steps


def losses_of(
    model: nn.Module, closure: Callable[[], Tensor], placement: str, steps: int = 2, **options: Any
) -> list[float]:
    seen: list[float] = []

    def noted() -> Tensor:
        loss = closure()
        seen.append(float(loss))
        return loss

    opt = zokern.MeZO(
        model, options.pop("lr", 0.0), eps=1e-2, seed=6, distribution=LowRank(1), placement=placement, **options
    )
    for _ in range(steps):
        opt.step(noted)
    return seen


@pytest.mark.parametrize("method", ["mezo", "mezo-adam", "helene", "gv", "greedy", "fzoo-normal", "es", "mezo-sign"])
def test_updates_have_the_bits_of_shadow(method):
    case, models = METHODS[method], [small(torch.bfloat16) for _ in range(2)]
    for model, placement in zip(models, ("forward", "shadow"), strict=True):
        opt = build(case, model, placement=placement, distribution=LowRank(1))
        for t in range(2):
            losses = iter(given(case, t))

            def closure(model: nn.Module = model, losses: Iterator[float] = losses) -> Tensor:
                model(tokens(0))
                return torch.tensor(next(losses), dtype=torch.float64)

            opt.step(closure)
    assert not same_bits(all_bits(models[0]), all_bits(small(torch.bfloat16)))
    assert same_bits(all_bits(models[0]), all_bits(models[1]))


def test_losses_are_those_of_shadow():
    groups = lambda m: [  # noqa: E731
        {"params": [p for n, p in m.named_parameters() if "inner" in n], "eps": 3e-2},
        {"params": [p for n, p in m.named_parameters() if "inner" not in n]},
    ]
    found = []
    for placement in ("forward", "shadow"):
        model = small()
        opt = zokern.MeZOGreedy(
            groups(model), 1e-3, module=model, eps=1e-2, seed=6, distribution=LowRank(2), placement=placement
        )
        seen: list[float] = []
        for _ in range(2):
            opt.step(lambda model=model, seen=seen: seen.append(float(loss := model(tokens(0)))) or loss)
        found.append(seen)
    assert len(set(found[0])) == len(found[0])
    assert found[0] == pytest.approx(found[1], rel=3e-6)


def test_a_probe_writes_to_no_weight_and_makes_no_pass():
    model = small()
    opt = zokern.MeZO(model, 0.0, distribution=LowRank(1), placement="forward", num_samples=2)
    versions = [p._version for p in model.parameters()]

    def closure() -> Tensor:
        assert versions == [p._version for p in params]
        return model(tokens(0))

    params = list(model.parameters())
    opt.step(closure)
    assert opt.counters["passes"] == 1
    small_ones = [p for p in params if p.dim() < 2]
    matrices = [p for p in params if p.dim() == 2]
    padded = lambda n: -(-n // 8) * 8  # noqa: E731
    factors = 8 + sum(padded(side) for p in matrices for side in p.shape) + 64
    assert sum(t.numel() for t in opt._placement.memory()) == sum(padded(p.numel()) for p in small_ones) + factors
    assert [t.data_ptr() for t in opt._placement.memory()] == [t.data_ptr() for t in opt._placement.memory()]


def test_lezo_and_learning():
    found = []
    for placement in ("forward", "shadow"):
        model = toy()
        seen = losses_of(
            model, model, placement, 4, lr=1e-2, num_samples=2, layers=zokern.RandomBlocks(2), weight_decay=0.1
        )
        found.append(seen)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_state_dict_and_copies_inside_the_closure():
    model = small()
    clean, params = all_bits(model), list(model.parameters())

    def closure() -> Tensor:
        state = model.state_dict()
        assert same_bits([bits(state[name]) for name, _ in model.named_parameters()], clean)
        assert state["embedding.weight"].data_ptr() == params[0].data_ptr()
        assert model.head.weight is model.embedding.weight
        assert "perturbed" in repr(model.embedding.weight)
        return model(tokens(0))

    seen = losses_of(model, closure, "forward")
    assert len(set(seen)) == len(seen)
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    pickle.loads(pickle.dumps(copy.deepcopy(model)))(tokens(0))


def test_checkpointing_and_inference_mode():
    model = small()
    plain = losses_of(model, lambda: model(tokens(0)), "forward")

    def checkpointed() -> Tensor:
        with torch.enable_grad():
            return checkpoint.checkpoint(model, tokens(0), use_reentrant=False).detach()

    def inference() -> Tensor:
        with torch.inference_mode():
            return model(tokens(0)).clone()

    assert losses_of(model, checkpointed, "forward") == plain
    assert losses_of(model, inference, "forward") == plain
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_move_inside_the_closure_are_followed():
    model = small()
    plain = losses_of(model, lambda: model(tokens(0)), "forward")

    def closure() -> Tensor:
        loss = model(tokens(0))
        for p in params:
            p.data = p.data.clone()
        return loss

    params = list(model.parameters())
    assert losses_of(model, closure, "forward") == plain


# --------------------------------------------------------------------------------------------------------- what is refused


def test_what_is_refused_by_the_constructor():
    model = small()
    for wanted, options, message in (
        (ValueError, {"distribution": "normal"}, r"distribution=zokern.LowRank\(1\)"),
        (ValueError, {"distribution": LowRank(6)}, "rank"),
        (ValueError, {"pipelined": True}, "has none; use placement='shadow'"),
    ):
        with pytest.raises(wanted, match=message):
            zokern.MeZO(model, 1e-3, **{"distribution": LowRank(1), "placement": "forward", **options})
    with pytest.raises(ValueError, match=r"pass the nn.Module"):
        zokern.MeZO(model.parameters(), 1e-3, distribution=LowRank(1), placement="forward")
    for method, options in (("HiZOO", {}), ("MeZOGV", {"smoothing": 1e-3}), ("MeZOGreedy", {"smoothing": 1e-3})):
        with pytest.raises(ValueError, match=r"z / sqrt\(h\), which has full rank"):
            getattr(zokern, method)(model, 1e-3, distribution=LowRank(1), placement="forward", **options)


def test_a_closure_that_runs_something_else_is_refused_before_a_weight_changes(monkeypatch):
    monkeypatch.setattr(plus, "TRACED", [False])
    model = small()
    other, clean = copy.deepcopy(model), all_bits(model)
    opt = zokern.MeZO(model, 1e-2, distribution=LowRank(1), placement="forward")
    with pytest.raises(RuntimeError, match=r"computed with none of the 3 matrices \(embedding.weight, ...\)"):
        opt.step(lambda: other(tokens(0)))
    assert same_bits(all_bits(model), clean)
    assert opt.counters["steps"] == 0
    opt.step(lambda: model(tokens(0)))


def test_what_is_refused_inside_a_closure():
    model = small()
    clean = all_bits(model)
    opt = zokern.MeZO(model, 1e-2, distribution=LowRank(1), placement="forward")
    kept: list[Tensor] = []

    def other_data() -> Tensor:
        model.layers[0].inner.weight.data = torch.zeros(6, 6)
        return model(tokens(0))

    with pytest.raises(RuntimeError, match=r"gave layers.0.inner.weight other data"):
        opt.step(other_data)
    opt.step(lambda: kept.append(model.layers[0].inner.weight) or model(tokens(0)) * 0)
    with pytest.raises(RuntimeError, match=r"layers.0.inner.weight was taken inside the closure and is used outside"):
        kept[0].sum()
    assert same_bits(all_bits(model), clean)
    config = importlib.import_module("torch._inductor.config")
    with config.patch(freezing=True), pytest.raises(ValueError, match="freezing makes constants"):
        opt.step(lambda: model(tokens(0)))


# ----------------------------------------------------------------------------------------------------------- other people's


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30, n_positions=24, eos_token_id=None)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def test_generation(gpt2):
    ids = words(2, 4)

    def reward() -> Tensor:
        out = gpt2.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
        return torch.stack(out.logits).double().square().mean()

    assert losses_of(gpt2, reward, "forward") == pytest.approx(losses_of(gpt2, reward, "shadow"), rel=1e-5)


def test_peft_and_check(gpt2):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        copy.deepcopy(gpt2),
        peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte"], fan_in_fan_out=True),
    ).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(3))
    closure = lambda: model(words(2, 6), labels=words(2, 6)).loss.double()  # noqa: E731
    assert losses_of(model, closure, "forward") == pytest.approx(losses_of(model, closure, "shadow"), rel=1e-5)
    opt = zokern.MeZO(model, 1e-3, distribution=LowRank(1), placement="forward")
    result = zokern.check(opt, closure, progress=False)
    assert result.ok
    assert "adds to the products of 5 matrices, and copies 0 other tensors" in str(result).replace("\n", " ")
    opt.step(closure)
    assert result.cost.memory["forward"] == sum(t.nbytes for t in opt._placement.memory())

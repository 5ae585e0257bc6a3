"""placement="forward": whatever a module does with a weight, it sees the perturbed one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint

import zokern
from tests.devices import DEVICE, missing
from tests.models import all_bits, same_bits, seeded, small, tokens
from tests.placement.test_forward import TERMS, error, losses_of, noisy, presented, rows
from zokern.directions import LowRank
from zokern.placement import plus
from zokern.placement.base import NotSeen
from zokern.placement.factors import Factors

Use = Callable[[nn.Linear, Tensor], Tensor]


class Using(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.inner, self.use = nn.Linear(12, 12), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.inner, x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


@torch.no_grad()
def part_taken_before(m: nn.Linear, x: Tensor) -> Tensor:
    rows, inner = m.weight[2:9], m.weight.T[1:5]
    m.weight.mul_(2.0)
    return torch.cat([x @ rows.T, x @ inner.T, m(x)], 1)


@torch.no_grad()
def written_through_parts(m: nn.Linear, x: Tensor) -> Tensor:
    parts = m.weight.detach().mul_(2.0), m.weight.data.add_(0.5), m.weight.t().mul_(2.0)
    return m(x) + sum(x @ part for part in parts)


def slope(m: nn.Linear, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(m(torch.tanh(m(x))).square().sum(), x, create_graph=True)[0].detach()


def again(reentrant: bool) -> Use:
    def use(m: nn.Linear, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return checkpoint.checkpoint(m, x.detach().requires_grad_(), use_reentrant=reentrant).detach()

    return use


def of_all(m: nn.Linear) -> dict[str, Tensor]:
    return dict(m.named_parameters())


class First(nn.Module):
    """Of a tuple, the first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out[0] if isinstance(out, tuple) else out


class Both(nn.Bilinear):
    def __init__(self) -> None:
        super().__init__(12, 12, 5)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


# Products alone, so that nothing is written out.
THIN: dict[str, Use] = {
    "linear by name": lambda m, x: functional.linear(input=x, weight=m.weight, bias=m.bias),
    "matmul by name": lambda m, x: torch.matmul(input=x, other=m.weight),
    "mm by name": lambda m, x: torch.mm(x, mat2=m.weight),
    "addmm by name": lambda m, x: torch.addmm(input=m.bias, mat1=x, mat2=m.weight),
    "embedding by name": lambda m, x: functional.embedding(input=torch.tensor([1, 2, 7]), weight=m.weight),
    "transpose by name": lambda m, x: x @ torch.transpose(input=m.weight, dim0=0, dim1=1),
    "permuted": lambda m, x: x @ m.weight.permute(1, 0) + x @ torch.permute(m.weight, (-1, -2)),
    "pieces": lambda m, x: torch.cat([x @ w.T for w in (*m.weight.chunk(5), *torch.split(m.weight, [5, 7]))], 1),
    "as it is": lambda m, x: functional.linear(x, m.weight.to(x.dtype).contiguous().type_as(x), x.type_as(m.weight)[0]),
    "its data": lambda m, x: functional.linear(x, m.weight.data),
    "another Parameter": lambda m, x: functional.linear(x, nn.Parameter(m.weight)),
    "by name": lambda m, x: functional.linear(x, dict(m.named_parameters())["weight"]),
    "functional_call": lambda m, x: torch.func.functional_call(m, of_all(m), (x,)),
    "vmap": lambda m, x: torch.vmap(lambda r: torch.func.functional_call(m, of_all(m), (r,)))(x),
    "jacobian": lambda m, x: torch.func.jacrev(lambda r: m(r).tanh())(x[0]),
    "jvp": lambda m, x: torch.func.jvp(lambda r: m(r).tanh(), (x,), (x,))[1],
    "autograd.Function": lambda m, x: Product.apply(x, m.weight),
    "gradient": slope,
    "reentrant checkpoint": again(True),
    "checkpoint": again(False),
    "a vector": lambda m, x: x[0] @ m.weight,
    "shallow copy": lambda m, x: copy.copy(m)(x),
}
WRITTEN_OUT: dict[str, Use] = {
    "out=": lambda m, x: torch.mm(x, m.weight, out=torch.empty(len(x), 12, dtype=x.dtype)),
    "sparse": lambda m, x: x.relu().to_sparse() @ m.weight,
    "compressed": lambda m, x: torch.mm(x.relu().to_sparse_csr(), m.weight),
    "nested": lambda m, x: functional.linear(torch.nested.nested_tensor([x[:3], x[3:]]), m.weight).to_padded_tensor(0.0),
    "part taken before a write": part_taken_before,
    "written through parts": written_through_parts,
    "deepcopy": lambda m, x: copy.deepcopy(m)(x),
    "gradient of the weight": lambda m, x: torch.func.grad(
        lambda p: torch.func.functional_call(m, p, (x,)).tanh().sum())(of_all(m))["weight"],
    "a stack": lambda m, x: torch.vmap(functional.linear, (None, 0))(x, torch.stack([m.weight, 2 * m.weight])).sum(0),
    "numpy": lambda m, x: x @ torch.from_numpy(m.weight.detach().numpy()).to(x.dtype),
    "both": lambda m, x: functional.linear(m.weight, m.weight),
    "numbers": lambda m, x: x * float(m.weight[0, 0]) * m.weight.tolist()[1][1],
}  # fmt: skip


@pytest.mark.parametrize("name", [*THIN, *WRITTEN_OUT])
def test_a_use_sees_the_perturbed_weight(name):
    use = {**THIN, **WRITTEN_OUT}[name]
    module, x = seeded(lambda: Using(use)), rows(7, 12)
    before = all_bits(module)
    with torch.no_grad():
        clean, rounded, exact = (
            copy.deepcopy(module)(x),
            noisy(module, 1, TERMS)(x),
            noisy(module, 1, TERMS, torch.float64)(x.double()),
        )
    with presented(module) as placement:
        seen = module(x)
    assert (seen.shape, seen.dtype) == (rounded.shape, rounded.dtype)
    assert error(seen, exact) <= 3 * error(rounded, exact) + 1e-7 * float(exact.norm())
    assert error(clean, exact) > 1e-3 * float(exact.norm())
    assert bool(placement.copied) == (name in WRITTEN_OUT)
    assert same_bits(all_bits(module), before)


@pytest.mark.parametrize("to", [torch.float32, torch.float16])
def test_a_cast_weight_is_never_rounded(to):
    """As routers do in float32."""
    module = seeded(lambda: Using(lambda m, x: functional.linear(x.to(to), m.weight.to(to))), torch.bfloat16)
    x = rows(7, 12).bfloat16()
    with torch.no_grad():
        exact = functional.linear(x.double(), noisy(module.inner, 1, TERMS, torch.float64).weight)
        rounded = noisy(module, 1, TERMS)(x)
    with presented(module) as placement:
        seen = module(x)
    assert seen.dtype == to
    assert error(seen, exact) < 0.3 * error(rounded, exact)
    assert not placement.copied


def test_several_matrices_at_once():
    """Experts in one tensor under autocast, and by matmul from either side."""
    weight = nn.Parameter(0.3 * torch.randn(4, 16, 18, generator=torch.Generator().manual_seed(3)))
    x, y = rows(4, 5, 16), rows(4, 18, 3)

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            w = self.weight
            return torch.cat([(x @ w).flatten(), torch.matmul(w, y).flatten(), torch.bmm(x, w).flatten()])

    module = Several()
    for cast in (False, True):
        with torch.no_grad():
            exact = noisy(module, 1, TERMS, torch.float64)(x.double(), y.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            with torch.no_grad():
                rounded = noisy(module, 1, TERMS)(x, y)
            with presented(module) as placement:
                seen = module(x, y)
        assert seen.dtype == rounded.dtype
        assert error(seen, exact) <= 1.5 * error(rounded, exact)
        assert not placement.copied


def test_attributes_of_a_parameter():
    """Libraries hang what they like on one: under a name that a stand-in needs, it has a copy."""
    module = seeded(lambda: nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)))
    module[0].weight.scale, module[1].weight.tag = 3.0, "mine"
    with presented(module) as placement:
        assert type(module[0].weight) is nn.Parameter
        assert module[0].weight.scale == 3.0
        assert type(module[1].weight) is plus.PlusLowRank
        assert module[1].weight.tag == "mine"
        module(rows(7, 12))
    assert not placement.copied  # this is what has been found in a forward


def test_a_probe_that_is_broken_off_leaves_no_sum(monkeypatch):
    """The next one's is another, also where what ends the first one fails halfway."""
    model = small()
    clean = all_bits(model)
    reads = lambda: (model(tokens(0)) + model.head.weight.square().sum()).double()  # noqa: E731
    opt = zokern.MeZO(model, 0.0, eps=1e-2, seed=6, distribution=LowRank(1), placement="forward")
    forget, calls = opt._placement._forget_sums, []

    def breaks() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        forget()

    monkeypatch.setattr(opt._placement, "_forget_sums", breaks)
    with pytest.raises(KeyboardInterrupt):
        opt.step(reads)
    assert same_bits(all_bits(model), clean)
    seen: list[float] = []
    opt.step(lambda: seen.append(float(loss := reads())) or loss)
    twin = small()
    assert seen == losses_of(twin, lambda: (twin(tokens(0)) + twin.head.weight.square().sum()).double(), "forward", 1)


@pytest.mark.skipif(plus.RELEASE < (2, 13), reason="PyTorch before 2.13 runs compiled code uncompiled")
def test_a_compiler_that_has_seen_other_code_takes_no_proof_away(monkeypatch):
    monkeypatch.setattr(plus, "TRACED", [False])
    torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2))
    model, other = small(), small()
    opt = zokern.MeZO(model, 1e-2, distribution=LowRank(1), placement="forward")
    with pytest.raises(NotSeen, match="computed with none"):
        opt.step(lambda: other(tokens(0)))
    model.compile(backend="eager")
    opt.step(lambda: model(tokens(0)))
    assert plus.TRACED[0]


def test_a_probe_that_is_broken_off_as_its_factors_are_aimed(monkeypatch):
    """Stand-ins that look at their factors in part are aimed anew."""
    model, twin, seen = small(), small(), []
    opt = zokern.MeZO(model, 0.0, eps=1e-2, seed=6, distribution=LowRank(1), placement="forward")
    of = Factors.of
    broken = lambda self, *shape: [*of(self, *shape)[:1], None]  # noqa: E731  its second matrix cannot be unpacked
    with monkeypatch.context() as patch:
        patch.setattr(Factors, "of", broken)
        with pytest.raises(TypeError):
            opt.step(lambda: model(tokens(0)))
    opt.step(lambda: seen.append(float(loss := model(tokens(0)))) or loss)
    assert seen == losses_of(twin, lambda: twin(tokens(0)), "forward", 1)


def test_a_part_alone_proves_nothing(monkeypatch):
    """Reading weights into a dictionary is not computing with them."""
    monkeypatch.setattr(plus, "TRACED", [False])
    model, other = small(), small()
    opt = zokern.MeZO(model, 1e-2, distribution=LowRank(1), placement="forward")
    with pytest.raises(NotSeen, match="computed with none"):
        opt.step(lambda: [p.detach() for p in model.parameters()] and other(tokens(0)))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_factors_have_the_same_bits_on_every_backend(backend):
    if missing(backend) or DEVICE[backend].type != "cpu":
        pytest.skip("this test is of CPU tensors")
    found = []
    for name in ("cpu", backend):
        model = small()
        found.append(losses_of(model, lambda model=model: model(tokens(0)), "forward", 1, backend=name))
    assert found[0] == found[1]


@pytest.mark.parametrize("make", [
    lambda: nn.GRU(12, 7), lambda: nn.utils.spectral_norm(nn.Linear(12, 20)),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2), Both,
], ids=["GRU", "spectral_norm", "encoder's fast path", "Bilinear"])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_modules_of_torch(make):
    module, x = seeded(lambda: First(make())), rows(4, 6, 12)
    with torch.no_grad():
        clean, rounded = copy.deepcopy(module)(x), noisy(module, 1, TERMS)(x)
        exact = noisy(module, 1, TERMS, torch.float64).double()(x.double())
    for _ in range(2):
        with presented(module):
            seen = module(x)
        assert error(seen, exact) <= 3 * error(rounded, exact) + 1e-7 * float(exact.norm())
    assert error(clean, exact) > 1e-3 * float(exact.norm())


def test_another_dtype_between_steps():
    model = small()
    opt = zokern.MeZO(model, 1e-3, eps=1e-2, seed=6, distribution=LowRank(1), placement="forward", rounding="nearest")
    shown = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        opt.step(lambda: shown.append(model.head.weight.dtype) or model(tokens(0)).float())
    assert shown == [torch.float32] * 2 + [torch.bfloat16] * 2 + [torch.float32] * 2


def _probed(model: nn.Module, opt: Any, batches: list[Tensor]) -> None:
    for x in batches:
        opt.step(lambda x=x: model(x).square().mean())


class Turns(nn.Module):
    """One of its experts for each batch, and a layer that nothing uses."""

    def __init__(self, idle: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.idle = nn.Linear(8, 8) if idle else None

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x[0, 0])](x)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("fold_every", [1, 4])
def test_an_unused_matrix_is_told_by_name_and_experts_take_turns(
    idle: bool, fold_every: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plus, "TRACED", [False])
    model = Turns(idle)
    opt = zokern.MeZO(model, 1e-4, distribution=zokern.LowRank(1), placement="forward", fold_every=fold_every)
    batches = [torch.full((2, 8), float(i % 3)) for i in range(9)]
    _probed(model, opt, batches)
    assert "matrices" not in capsys.readouterr().err  # after 18 probes
    _probed(model, opt, batches * 3)
    told = capsys.readouterr().err
    assert told.count("1 of 4 matrices (idle.weight) were in no product or lookup of 20 probes") == int(idle), told
    assert told.count("matrices") == int(idle)


@pytest.mark.parametrize("idle", [False, True])
def test_an_unused_matrix_is_told_of_directions_that_share_a_forward(
    idle: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside matrices that are written out: they are no stand-ins from then on."""
    monkeypatch.setattr(plus, "TRACED", [False])
    torch.manual_seed(0)
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(8, 8) / 3) for name in "abcd"})
    model.idle = nn.Linear(8, 8) if idle else None
    opt = zokern.FZOO(model, 1e-4, candidates=4, distribution=zokern.LowRank(1), placement="forward")

    def closure(x: Tensor) -> Tensor:
        half = torch.cat([x @ model["a"].t()[:, :4], x @ model["a"].t()[:, 4:]], dim=1)
        return (half @ model["b"] @ model["c"] + x @ torch.tanh(model["d"])).square().mean(dim=1)

    for _ in range(30):
        opt.step(closure, [torch.ones(2, 8)], batched=True)
    assert opt.metrics["probes_per_forward"] == 5
    told = capsys.readouterr().err
    assert told.count("1 of 3 matrices (idle.weight) were in no product or lookup of 20 probes") == int(idle), told
    assert told.count("in no product") == int(idle), told


def test_an_unused_matrix_is_told_also_where_its_module_is_changed_in_mid_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plus, "TRACED", [False])
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    alias = model[0].weight.detach().numpy()
    opt = zokern.MeZO(model, 1e-4, distribution=zokern.LowRank(1), placement="forward")
    x = torch.randn(4, 8)
    _probed(model, opt, [x] * 30)
    assert capsys.readouterr().err == ""
    model[0].forward = lambda t: torch.from_numpy(t.numpy() @ alias.T)
    _probed(model, opt, [x] * 30)
    assert "1 of 2 matrices (0.weight)" in capsys.readouterr().err

"""placement="stream": no weight is seen unperturbed, none is left dirty, and what cannot be served is refused by name."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import methods
from tests.methods import METHODS
from tests.models import BLOCKS, HUGGING_FACE, WIDTH, WORDS, Block, Language, Toy, gpt2, seeded, toy
from zokern import placement as placements
from zokern.noise import derive_seed
from zokern.placement import stream
from zokern.placement.inplace import InPlace
from zokern.placement.shadow import Shadow
from zokern.placement.stream import OutsideItsBlock, Stream, extra_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHOWN = ["mezo", "hizoo", "helene", "gv-curved", "fzoo"]


class State:
    """A module's parameters (objects, storages, bits) and all of its hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entries = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
        self.values = [p.detach().clone() for _, _, p in self.entries]
        self.addresses = [p.data_ptr() for _, _, p in self.entries]
        self.hooks = self.counted()

    def counted(self) -> list[tuple[str, int]]:
        return [
            (key, len(value))
            for m in self.model.modules()
            for key, value in vars(m).items()
            if "hooks" in key and isinstance(value, dict)
        ]

    def in_place(self) -> None:
        for (module, name, p), address in zip(self.entries, self.addresses, strict=True):
            assert module._parameters[name] is p, f"{name} is not the module's own parameter any more"
            assert p.data_ptr() == address
            if isinstance(module, nn.LSTM):
                assert any(w is p for w in module._flat_weights)
        assert self.counted() == self.hooks

    def clean(self) -> None:
        self.in_place()
        for (_, name, p), value in zip(self.entries, self.values, strict=True):
            view = torch.int32 if p.element_size() == 4 else torch.int16
            assert torch.equal(p.detach().view(view), value.view(view)), f"{name} is dirty"


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def run(
    build: Callable[[], nn.Module],
    name: str,
    dtype: torch.dtype | None = None,
    method: str = "mezo",
    steps: int = 3,
    loss: Callable[[nn.Module], Tensor] = lambda m: m(),
    **options: Any,
) -> tuple[nn.Module, list[Tensor], Any]:
    model = seeded(build, dtype)
    state, seen = State(model), []

    def closure() -> Tensor:
        seen.append(loss(model))
        return seen[-1]

    opt = methods.build(METHODS[method], model, placement=name, seed=7, eps=1e-2, weight_decay=0.1, **options)
    for _ in range(steps):
        opt.step(closure)
    state.in_place()
    assert opt.skipped_steps == 0
    return model, seen, opt


def assert_same_as_shadow(build: Callable[[], nn.Module], *args: Any, **options: Any) -> Any:
    one, seen, a = run(build, "shadow", *args, **options)
    two, seen2, b = run(build, "stream", *args, **options)
    assert isinstance(b._placement, Stream)
    assert len({float(x) for x in seen}) > 1
    assert all(torch.equal(x, y) for x, y in zip(seen, seen2, strict=True))
    assert same(one, two)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        assert all(torch.equal(a.state[p][k], b.state[q][k]) for k in a.state[p])
    return b


# ---------------------------------------------------------------------------------------------- same bits as in shadow


@pytest.mark.parametrize("layers", [0, 2], ids=["all", "half"])
@pytest.mark.parametrize("method", SHOWN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_shadow(dtype, method, layers):
    options = {"layers": zokern.RandomBlocks(layers)} if layers else {}
    assert_same_as_shadow(Toy, dtype, method, 5, **options)


REAL_MODELS = pytest.mark.parametrize("build", HUGGING_FACE.values(), ids=HUGGING_FACE)


@REAL_MODELS
@pytest.mark.parametrize(
    ("dtype", "method", "layers"),
    [
        (torch.float32, "mezo", 0),
        (torch.bfloat16, "mezo", 2),
        (torch.float16, "hizoo", 0),
        (torch.bfloat16, "helene", 1),
        (torch.bfloat16, "gv-curved", 0),
        (torch.float32, "fzoo", 2),
    ],
    ids=str,
)
def test_same_bits_as_shadow_for_real_models(build, dtype, method, layers):
    options = {"layers": zokern.RandomBlocks(layers)} if layers else {}
    assert_same_as_shadow(build, dtype, method, 2, **options)


# ------------------------------------------------------------------------------------------------ what the forward sees


def perturbed(model: nn.Module, active: set[str], seed: int, eps: float) -> nn.Module:
    """An independent copy at round(theta + eps z)."""
    other = copy.deepcopy(model)
    named = [(i, p) for i, (n, p) in enumerate(other.named_parameters()) if n in active]
    with torch.no_grad():
        zokern.add_noise_([p for _, p in named], tensor_ids=[i for i, _ in named], seeds=[seed], coefs=[eps])
    return other


@pytest.mark.parametrize("build", [Toy, *HUGGING_FACE.values()], ids=["own", *HUGGING_FACE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropped", [0, 2])
def test_every_module_sees_exactly_the_perturbed_weights(build, dtype, dropped):
    """Seen by hooks on all modules before and after they run, and by the loss; dropped blocks are seen as they are."""
    model, eps, used = seeded(build, dtype), 1e-2, {}
    clean = copy.deepcopy(model)
    names = {id(m): n for n, m in model.named_modules()}

    def look(module: nn.Module, *_: Any) -> None:
        for name, p in module._parameters.items():
            if p is not None:
                used.setdefault(f"{names[id(module)]}.{name}".lstrip("."), []).append(p.detach().clone())

    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(look)
            module.register_forward_hook(look)
    layers = zokern.RandomBlocks(dropped)
    opt = zokern.MeZO(model, 0.0, eps=eps, placement="stream", layers=layers, seed=5)
    for step in range(2):
        left_out = opt.layers.dropped(5, step)
        active = {n for n, p in model.named_parameters() if opt.layers.block_of(p) not in left_out}
        signs = iter([1.0, -1.0])

        def closure(step=step, active=active, signs=signs) -> Tensor:
            used.clear()
            loss = model()
            expected = perturbed(clean, active, derive_seed(5, step, 0), next(signs) * eps)
            assert torch.equal(loss, expected())
            assert not torch.equal(loss, clean())
            values = dict(expected.named_parameters(remove_duplicate=False))
            assert used.keys() <= values.keys()
            tied = {id(p) for n, p in expected.named_parameters(remove_duplicate=False) if n in used}
            assert all(id(p) in tied for p in expected.parameters())  # each was in a module that ran
            for name, seen in used.items():
                assert all(torch.equal(s, values[name]) for s in seen), name
            return loss

        opt.step(closure)
    assert same(model, clean)


# ------------------------------------------------------------------------------------------------------- what it handles


class SharedByBlocks(Toy):
    """One tensor in two blocks, and one of a block outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].inner.weight = self.layers[0].inner.weight
        self.norm.weight = self.layers[1].gain


class SharedModules(Toy):
    """One module in two blocks, and a block's module called from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3].inner = self.layers[0].inner
        self.also = self.layers[1].norm

    def run(self, x: Tensor) -> Tensor:
        return super().run(self.also(x)) @ self.also.weight.diag()


class Attention(nn.Module):
    """Reads out_proj.weight and never calls out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """nn.LSTM keeps a list of its weights beside."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lstm(x)[0]


class ReadsItsChild(Block):
    """Takes a child's weight without calling the child."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x) @ self.inner.weight.type(x.dtype) + self.inner.bias


class Normalised(nn.Module):
    """A weight computed from two parameters; lists of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.several = nn.ParameterList([torch.randn(WIDTH), torch.randn(WIDTH)])
        self.named = nn.ParameterDict({"a": torch.randn(WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x)) * self.several[0] * self.named["a"] + self.several[1]


class Frozen(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner.requires_grad_(False)


class CalledTwice(Toy):
    """Weight sharing across depth: every block runs twice, and the list holds one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3] = self.layers[1]

    def run(self, x: Tensor) -> Tensor:
        return super().run(super().run(x))


class TorchEncoder(Toy):
    """Has a fast path with the raw weights of its layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
        self.layers = nn.ModuleList()
        self.encoder = nn.TransformerEncoder(layer, 3)

    def run(self, x: Tensor) -> Tensor:
        mask = torch.zeros(1, WORDS, dtype=torch.bool)
        mask[0, -2:] = True
        return nn.functional.pad(self.encoder(x[None], src_key_padding_mask=mask)[0], (0, 0, 0, WORDS))[:WORDS]


class Retried(Toy):
    """Catches an exception of a block and calls it again."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                layer(x[:, :2])  # too narrow
            except RuntimeError:
                x = layer(x)
        return x


class KeepsGraphs(Toy):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x


class InferenceMode(Toy):
    def run(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().run(x)


class TwoStacks(Toy):
    """With more weights in one block than in the others, and mixed dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].inner = nn.Sequential(nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)).bfloat16()
        self.layers[2].norm.bfloat16()
        self.after = nn.ModuleList(Block() for _ in range(2))

    def run(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, *self.after]:
            dtype = layer.norm.weight.dtype  # may be asked for outside
            x = layer(x.to(dtype)).to(x.dtype)
        return x


HANDLED: dict[str, Callable[[], nn.Module]] = {
    "untied": lambda: Toy(tied=False),
    "a parameter in two blocks, one in a block and outside": SharedByBlocks,
    "a module in two blocks, one in a block and outside": SharedModules,
    "MultiheadAttention": lambda: Toy(Attention),
    "LSTM": lambda: Toy(Recurrent),
    "a block reads its child's weight": lambda: Toy(ReadsItsChild),
    "parametrized": lambda: Toy(Normalised),
    "partly frozen": lambda: Toy(Frozen),
    "blocks called twice": CalledTwice,
    "TransformerEncoder": TorchEncoder,
    "an exception caught and the block called again": Retried,
    "checkpointing": KeepsGraphs,
    "inference mode": InferenceMode,
    "two stacks, mixed dtypes": TwoStacks,
}


@pytest.mark.parametrize("build", HANDLED.values(), ids=HANDLED)
def test_handled(build):
    assert_same_as_shadow(build)
    model = seeded(build)
    clean, eps = copy.deepcopy(model), 1e-2
    every = {n for n, p in model.named_parameters() if p.requires_grad}
    signs = iter([1.0, -1.0])

    def closure() -> Tensor:
        loss = model()
        assert torch.equal(loss, perturbed(clean, every, derive_seed(5, 0, 0), next(signs) * eps)())
        return loss

    zokern.MeZO(model, 0.0, eps=eps, placement="stream", seed=5).step(closure)
    assert same(model, clean)


def test_generate_calls_each_block_many_times():
    def loss(model: nn.Module) -> Tensor:
        tokens = torch.arange(6).reshape(2, 3)
        made = model.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(made.logits).double().square().mean()

    assert_same_as_shadow(HUGGING_FACE["GPT-2"], loss=loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_wrapped_by_peft(dtype):
    peft = pytest.importorskip("peft")

    def build() -> nn.Module:
        model = Language(gpt2)
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
        model.model = peft.get_peft_model(model.model, lora)
        return model

    opt = assert_same_as_shadow(build, dtype)
    assert sum(len(unit.sweep) for unit in stream.units_of(opt.module, opt.active.sweep)[1:]) == 6
    model = seeded(build)
    with torch.no_grad():
        zokern.MeZO(model, 1e-2, placement="stream").step(lambda: model.model.disable_adapter() and model())


def test_hooks_of_the_user_see_perturbed_weights_and_stay():
    model, seen = toy(), []
    clean = copy.deepcopy(model)

    def before(module: nn.Module, args: Any) -> Any:
        seen.append((module, module.inner.weight.detach().clone()))
        return (args[0] * 1.0,)

    def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append((module, module.inner.weight.detach().clone()))
        return out * 2.0

    handles = []
    for m in (model, clean):
        for layer in m.layers:
            handles += [
                layer.register_forward_pre_hook(before),
                layer.register_forward_hook(after),
                layer.register_forward_hook(after, prepend=True),
                layer.inner.register_forward_hook(lambda m, a, out: out + 1.0),
            ]
    state, signs = State(model), iter([1.0, -1.0])

    def closure() -> Tensor:
        seen.clear()
        loss = model()
        mine = list(seen)
        every = {n for n, _ in model.named_parameters()}
        expected = perturbed(clean, every, derive_seed(0, 0, 0), next(signs) * 1e-2)
        assert torch.equal(loss, expected())
        for module, weight in mine:
            number = [layer is module for layer in model.layers].index(True)
            assert torch.equal(weight, expected.layers[number].inner.weight)
        assert len(mine) == 3 * BLOCKS
        return loss

    zokern.MeZO(model, 0.0, eps=1e-2, placement="stream").step(closure)
    state.clean()
    assert torch.equal(model(), clean())
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["inplace", "shadow", "stream"])
def test_autocast_around_the_step_casts_each_perturbation_anew(name):
    """autocast remembers the casts of weights until its outermost end."""

    def losses(around: bool) -> list[float]:
        model, seen = toy(), []
        outer, inner = (
            torch.autocast("cpu", torch.bfloat16) if here else contextlib.nullcontext() for here in (around, not around)
        )

        def closure() -> Tensor:
            with inner:
                seen.append(model())
            return seen[-1]

        opt = zokern.MeZO(model, 1e-2, eps=1e-2, placement=name, num_samples=2)
        with outer:
            for _ in range(2):
                opt.step(closure)
        return [float(x) for x in seen]

    assert losses(True) == losses(False)
    assert len(set(losses(True))) == 8


def test_accumulation_gives_the_same_bits():
    runs = []
    for name in ("shadow", "stream"):
        model, losses = toy(torch.bfloat16), []
        opt = methods.build(METHODS["mezo"], model, placement=name, seed=7)
        for _ in range(3):
            losses.append(opt.step(lambda scale, m=model: m() * scale, [1.0, 2.0, 0.5]))
        runs.append((model, losses, opt.counters))
    (one, a, counted), (two, b, counted2) = runs
    assert same(one, two)
    assert a == b
    assert all(counted[k] == counted2[k] for k in ("steps", "forwards", "passes"))


@pytest.mark.parametrize("method", SHOWN)
@pytest.mark.parametrize("dropped", [0, 3])
def test_counts(method, dropped):
    """One pass for each presented state and one for the update, and no element is moved twice."""
    options = {"layers": zokern.RandomBlocks(dropped)} if dropped else {}
    counted = [run(Toy, name, torch.bfloat16, method, **options)[2].counters for name in ("shadow", "stream")]
    for key in ("steps", "forwards", "passes", "elements_moved"):
        assert counted[0][key] == counted[1][key], key
    assert counted[1]["launches"] > counted[0]["launches"]


# ------------------------------------------------------------------------------------------------------ what it refuses


class AcrossBlocks(Toy):
    """A block reads the weight of another."""

    def run(self, x: Tensor) -> Tensor:
        self.layers[2].__dict__["other"] = self.layers[1]
        self.layers[2].register_forward_hook(lambda m, a, out: out @ m.other.inner.weight)
        return super().run(x)


class Outside(Toy):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x) + self.layers[1].gain


class CastOutside(Toy):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x) + self.layers[1].gain.type(torch.float64)


class PartOfABlock(Toy):
    def run(self, x: Tensor) -> Tensor:
        return super().run(self.layers[1].inner(x))


class ForwardCalled(Toy):
    """Past the hooks."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return x


class Nested(Toy):
    """A block calls another that is not its child."""

    def run(self, x: Tensor) -> Tensor:
        self.layers[1].register_forward_pre_hook(lambda m, a: (self.layers[2](a[0]),))
        return super().run(x)


class EarlyExit(Toy):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


class ReturnsItsWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), self.inner.weight[0]


class Returned(Toy):
    """A view of a block's weight is used after the next block ran in the same memory."""

    def __init__(self) -> None:
        super().__init__(ReturnsItsWeight)

    def run(self, x: Tensor) -> Tensor:
        views = []
        for layer in self.layers:
            x, view = layer(x)
            views.append(view)
        return x + sum(views)


class Replaced(Toy):
    def run(self, x: Tensor) -> Tensor:
        self.layers[1].gain = nn.Parameter(torch.zeros(WIDTH))
        return super().run(x)


class Functional(Toy):
    def run(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.layers[1], {"gain": torch.zeros(WIDTH)}, (x,))


class Penalty(Toy):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x) + sum(p.square().sum() for p in self.parameters())


class Graph(Toy):
    """Autograd would read the weights of a block after it ran."""

    def run(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return super().run(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "across blocks": (AcrossBlocks, r"layers\.1\.inner\.weight was used outside"),
    "from outside": (Outside, r"layers\.1\.gain was used outside"),
    "cast outside": (CastOutside, r"layers\.1\.gain was used outside"),
    "a part of a block called": (PartOfABlock, r"layers\.1\.inner\.weight was used outside"),
    "forward() called": (ForwardCalled, r"layers\.0\.\S+ was used outside"),
    "a block in another": (Nested, r"layers\.2 was called while layers\.1 runs"),
    "early exit": (EarlyExit, r"did not call layers\.3"),
    "a view returned": (Returned, r"view of the perturbed weights of layers\.0"),
    "replaced": (Replaced, r"layers\.1\.gain was replaced"),
    "functional_call": (Functional, r"layers\.1\.gain was replaced"),
    "penalty on all weights": (Penalty, r"was used outside"),
    "gradients": (Graph, r"view of the perturbed weights of layers\.0"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refused_by_name_and_clean_after(build, message, dtype):
    model = seeded(build, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    objects = [p for n, p in model.named_parameters()]
    opt = zokern.MeZO(model, 1e-2, placement="stream")
    with pytest.raises(RuntimeError, match=message + r"[\s\S]*placement='shadow'"):
        opt.step(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert opt.counters["steps"] == 0


def test_a_block_that_calls_another_block_as_its_child_is_handled():
    """Its weights then count as shared, outside the blocks."""

    class Chain(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.layers[2].helper = self.layers[0]
            self.layers[2].register_forward_hook(_use_helper)

    assert_same_as_shadow(Chain)


def _use_helper(module: nn.Module, _: Any, out: Tensor) -> Tensor:
    return out + module.helper(out)


VALUES: dict[str, Callable[[nn.Parameter], Any]] = {
    "+": lambda p: p + 1,
    "in a list": lambda p: torch.cat([p, p]),
    "foreach": lambda p: torch._foreach_mul([p], 2.0),
    "operator": lambda p: torch.ops.aten.add.Tensor(p, p),
    "type": lambda p: p.type(torch.float64),
    "numpy": lambda p: p.detach().numpy(),
    "tolist": lambda p: p.tolist(),
    "item": lambda p: p[0].item(),
    "data": lambda p: p.data,
    "data =": lambda p: setattr(p, "data", torch.zeros(WIDTH)),
    "data_ptr": lambda p: p.data_ptr(),
    "storage": lambda p: p.untyped_storage().data_ptr(),
    "dlpack": torch.from_dlpack,
    "in place": lambda p: p.zero_(),
    "copied from": lambda p: torch.zeros(WIDTH).copy_(p),
    "copied to": lambda p: p.copy_(torch.zeros(WIDTH)),
    "equal": lambda p: torch.equal(p, torch.zeros(WIDTH)),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda p: torch.save(p, io.BytesIO()),
    "subclass": lambda p: p.as_subclass(torch.Tensor),
    "without torch functions": lambda p: _raw_add(p),
    "autograd.Function": lambda p: _Identity.apply(p),
}


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return p * 1.0


def _raw_add(p: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return p + 1


@pytest.mark.parametrize("read", VALUES.values(), ids=VALUES)
def test_values_of_a_block_cannot_be_read_outside_it(read):
    model = toy()
    state = State(model)
    reached = []

    def closure() -> Tensor:
        p = model.layers[1].gain
        assert isinstance(p, OutsideItsBlock)
        reached.append(read(p))
        return model()

    with pytest.raises((RuntimeError, TypeError)):
        zokern.MeZO(model, 1e-2, placement="stream").step(closure)
    assert not reached
    state.clean()


def test_what_may_be_asked_of_a_parameter_outside_its_block():
    model = toy(torch.bfloat16)
    for p in model.parameters():
        p.of_a_library = "kept"
    clean = dict(model.named_parameters())

    def closure() -> Tensor:
        inside = dict(model.named_parameters())
        assert list(inside) == list(clean)
        for name, p in inside.items():
            own_p = clean[name]
            assert p is not own_p
            assert isinstance(p, nn.Parameter)
            for ask in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "nbytes", "layout", "is_cuda"):
                assert getattr(p, ask) == getattr(own_p, ask), ask
            for ask in ("size", "stride", "numel", "nelement", "element_size", "dim", "is_contiguous", "type"):
                assert getattr(p, ask)() == getattr(own_p, ask)(), ask
            assert len(p) == len(own_p)
            assert p.is_floating_point()
            assert p.grad is None
            assert p.of_a_library == "kept"
        assert "layers.1.gain" in repr(model.layers[1].gain)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in clean.values())
        model.zero_grad()
        model.train()
        model.eval()
        return model()

    zokern.MeZO(model, 1e-2, placement="stream").step(closure)


def test_a_tied_parameter_in_a_block_is_one_parameter_inside_the_closure():
    def tied() -> nn.Module:
        block = Block()
        block.again = nn.Linear(WIDTH, WIDTH)
        block.again.weight = block.inner.weight
        return block

    model = seeded(lambda: Toy(tied))
    names = [n for n, _ in model.named_parameters()]
    opt = zokern.MeZO(model, 0.0, placement="stream")
    opt.step(lambda: [n for n, _ in model.named_parameters()] == names and model())


def test_properties_of_hugging_face_models_inside_the_closure():
    model = seeded(HUGGING_FACE["OPT"], torch.bfloat16)
    size, memory = model.model.num_parameters(only_trainable=True), model.model.get_memory_footprint()

    def closure() -> Tensor:
        assert model.model.dtype == torch.bfloat16
        assert model.model.device == torch.device("cpu")
        assert model.model.num_parameters(only_trainable=True) == size
        assert model.model.get_memory_footprint() == memory
        return model()

    zokern.MeZO(model, 1e-2, placement="stream").step(closure)


# --------------------------------------------------------------------------------------------------------- torch.compile


def compiled_whole(model: Toy) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_method(model: Toy) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_block(model: Toy) -> nn.Module:
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    return model


def compiled_inside(model: Toy) -> nn.Module:
    model.layers[2].inner.compile(backend="eager")
    return model


@pytest.mark.parametrize("how", [compiled_whole, compiled_method, compiled_block, compiled_inside])
def test_a_compiled_module_is_refused(how):
    name = {"compiled_inside": r"layers\.2\.inner", "compiled_block": r"layers\.1|no nn\.ModuleList"}
    with pytest.raises(ValueError, match=name.get(how.__name__, "the module, compiled by torch.compile")):
        zokern.MeZO(how(toy()), 1e-3, placement="stream")
    assert isinstance(zokern.MeZO(how(toy(torch.bfloat16)), 1e-3)._placement, Shadow)


def test_a_module_compiled_after_the_optimizer_was_made_is_refused():
    model = toy()
    opt = zokern.MeZO(model, 1e-3, placement="stream")
    model.layers[1].compile(backend="eager")
    state = State(model)
    with pytest.raises(ValueError, match=r"layers\.1, compiled"):
        opt.step(model)
    state.clean()


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", ["shadow", "stream"])
@pytest.mark.parametrize("how", ["wrapper", "function", "forwards of blocks"])
def test_compiled_around_a_plain_module(name, how, warm):
    """The optimizer has the plain module and the closure calls something compiled: the forward sees the copies."""
    model, twin = toy(), toy()
    torch._dynamo.reset()
    if how == "wrapper":
        called: Callable[[], Tensor] = torch.compile(model, backend="eager")
    elif how == "function":
        called = torch.compile(lambda: model(), backend="eager")
    else:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, backend="eager")
        called = model
    with torch.no_grad():
        if warm:
            called()
        seen: list[list[float]] = [[], []]
        runs = ((model, called, name), (twin, twin, "shadow"))
        for (m, f, which), losses in zip(runs, seen, strict=True):
            opt = zokern.MeZO(m, 1e-2, eps=1e-2, placement=which)
            for _ in range(2):
                opt.step(lambda f=f, losses=losses: (losses.append(float(out := f())), out)[1])
    assert seen[0] == seen[1]
    assert same(model, twin)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", [compiled_whole, compiled_method, compiled_block, compiled_inside])
def test_shadow_is_seen_by_a_compiled_module(how):
    torch._dynamo.reset()
    model, twin = how(toy()), toy()
    with torch.no_grad():
        model()  # compiled before the copies are there
    seen: list[list[float]] = [[], []]
    for m, losses in zip((model, twin), seen, strict=True):
        opt = zokern.MeZO(m, 1e-2, eps=1e-2, placement="shadow")
        for _ in range(2):
            opt.step(lambda m=m, losses=losses: (losses.append(float(out := m())), out)[1])
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 4
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------- clean weights


class Stop(Exception):
    pass


PLACES = ["pre-hook", "inner pre-hook", "forward", "inner hook", "hook", "hook of the root", "closure"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [0, 2, BLOCKS - 1])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [0, 3])
def test_an_exception_anywhere_leaves_clean_weights(place, number, error, call):
    model, left = toy(torch.bfloat16), [call]
    layer, armed = model.layers[number], [True]

    def fail(*_: Any) -> None:
        if armed and left[0] == 0:
            raise error("from the test")
        left[0] -= 1

    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        y = original(x)
        fail()
        return y

    {
        "pre-hook": lambda: layer.register_forward_pre_hook(fail),
        "inner pre-hook": lambda: layer.inner.register_forward_pre_hook(fail),
        "forward": lambda: setattr(layer, "forward", forward),
        "inner hook": lambda: layer.inner.register_forward_hook(fail),
        "hook": lambda: layer.register_forward_hook(fail),
        "hook of the root": lambda: model.register_forward_hook(fail),
        "closure": lambda: None,
    }[place]()
    state = State(model)
    opt = methods.build(METHODS["mezo"], model, placement="stream", seed=7)
    with pytest.raises(error, match="from the test"):
        opt.step(lambda: (model(), fail() if place == "closure" else None)[0])
    state.clean()
    armed.clear()
    twin = toy(torch.bfloat16)
    fresh = methods.build(METHODS["mezo"], twin, placement="shadow", seed=7)
    for o, m in ((opt, model), (fresh, twin)):  # and the next step is as if nothing had been
        o.step(m)
    assert same(model, twin)


TRACED = tuple(str(Path(zokern.__file__).parent / name) for name in ("optim", "placement", "sweep.py"))


def step_with_signal_at(line: int, model: nn.Module, opt: Any) -> int:
    """One step with Ctrl-C as zokern starts its line number `line`, the hooks' lines included; the lines there were."""
    count, last = 0, ("", 0)

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count, last
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        here = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and here != last:
            count += 1
            last = here
            if count == line:
                signal.raise_signal(signal.SIGINT)
        return tracer

    sys.settrace(tracer)
    try:
        opt.step(model)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count


def test_ctrl_c_at_many_lines_of_a_step():
    """Every seventh, the hooks included, which run while Ctrl-C is let through."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = toy(torch.bfloat16)
    state = State(model)

    def made() -> Any:
        return zokern.MeZO(model, 1e-2, placement="stream", weight_decay=0.1)

    total = step_with_signal_at(-1, model, made())
    after = State(model).values
    assert total > 500
    outcomes = set()
    for line in range(1, total + 1, 7):
        for (_, _, p), value in zip(state.entries, state.values, strict=True):
            p.data.copy_(value)
        opt = made()
        step_with_signal_at(line, model, opt)
        state.in_place()
        now = State(model).values
        done = all(torch.equal(a, b) for a, b in zip(now, after, strict=True))
        outcomes.add(done)
        assert opt.counters["steps"] == done, line
        if not done:
            state.clean()
    signal.signal(signal.SIGINT, old)
    assert outcomes == {True, False}


@pytest.mark.parametrize("inside", [False, True], ids=["in the closure", "in a block"])
def test_state_dict_inside_the_closure_is_of_the_weights(inside):
    model = toy(torch.bfloat16)
    clean = {k: v.clone() for k, v in model.state_dict().items()}
    files = []

    def save(*_: Any) -> None:
        state = model.state_dict()
        assert list(state) == list(clean)
        assert all(torch.equal(state[k], clean[k]) for k in clean)
        wrapped = nn.ModuleDict({"inner": model}).state_dict()
        assert all(torch.equal(wrapped[f"inner.{k}"], clean[k]) for k in clean)
        assert model.state_dict(keep_vars=True)["head.weight"] is parameter
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        files.append(file)

    parameter = model.head.weight
    if inside:
        model.layers[1].register_forward_hook(save)

    def closure() -> Tensor:
        first = model()
        if not inside:
            save()
        second = model()
        assert torch.equal(first, second)
        assert not torch.equal(first, base)
        return second

    with torch.no_grad():
        base = model()
    files.clear()
    zokern.MeZO(model, 0.0, eps=1e-2, placement="stream").step(closure)
    assert len(files) == (4 if inside else 2)
    for file in files:
        file.seek(0)
        loaded = torch.load(file)
        assert all(torch.equal(loaded[k], clean[k]) for k in clean)


@pytest.mark.parametrize("name", ["shadow", "stream"])
def test_a_failed_state_dict_that_the_closure_swallows_is_an_error(name):
    """The module would show clean weights to the rest of the closure."""
    model = toy()
    state = State(model)

    def broken(*_: Any) -> None:
        raise Stop("from a hook")

    handle = model.norm.register_state_dict_post_hook(broken)

    def closure() -> Tensor:
        try:
            model.state_dict()
        except Stop:
            return model()
        raise AssertionError

    with pytest.raises(RuntimeError, match=r"state_dict\(\) asked for inside the closure failed"):
        zokern.MeZO(model, 1e-2, placement=name).step(closure)
    handle.remove()
    state.clean()


def test_a_copy_of_the_module_inside_the_closure_is_refused():
    model = toy()
    state = State(model)
    with pytest.raises(RuntimeError, match=r"layers\.0\.gain was used outside"):
        zokern.MeZO(model, 1e-2, placement="stream").step(lambda: copy.deepcopy(model)())
    state.clean()


def test_nothing_is_left_behind():
    """After steps the module is its own: entries, storages, hooks; it can be copied and pickled."""
    model = seeded(lambda: Toy(Recurrent), torch.float32)
    state = State(model)
    opt = methods.build(METHODS["hizoo"], model, placement="stream")
    for _ in range(3):
        opt.step(model)
        state.in_place()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(model, other)
        with torch.no_grad():
            assert torch.equal(model(), other())


def test_an_earlier_failure_kept_alive_does_not_look_like_a_view():
    """A traceback holds the frames of a block's forward and what they computed from its weights."""
    model, kept = toy(), []
    layer = model.layers[1]
    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        view = layer.inner.weight.t()
        raise Stop(view)

    layer.forward = forward
    opt = zokern.MeZO(model, 1e-2, placement="stream")
    for attempt in range(2):
        try:
            opt.step(model)
        except Stop as error:
            kept.append(error)
        assert len(kept) == attempt + 1
    layer.forward = original
    opt.step(model)
    assert opt.counters["steps"] == 1


@pytest.mark.parametrize("name", ["shadow", "stream"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_300_steps_with_lr_zero_change_no_bit(name, dtype):
    model = toy(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = -0.0
    state = State(model)
    opt = zokern.MeZO(model, 0.0, placement=name, weight_decay=0.1)

    def closure() -> float:
        model()
        return 1.0

    for _ in range(300):
        opt.step(closure)
    state.clean()


# --------------------------------------------------------------------------------------------------------------- memory


def held(opt: Any) -> int:
    chosen = opt._placement
    return sum(pool.nbytes for pools in (chosen.block_pools, chosen.outside_pools) for pool in pools.values())


@pytest.mark.parametrize("build", [Toy, TwoStacks, SharedModules, *HUGGING_FACE.values()])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_extra_memory_is_what_is_said(build, dtype):
    model = seeded(build, dtype)
    opt = zokern.MeZO(model, 1e-3, placement="stream")
    assert held(opt) == 0  # nothing before the first step
    addresses = set()
    for _ in range(3):
        opt.step(model)
        assert held(opt) == extra_bytes(model)
        addresses.add(tuple(p.data_ptr() for p in opt._placement.block_pools.values()))
    assert len(addresses) == 1
    sizes = [sum(p.nbytes for p in block.parameters()) for block in model.layers] if build is Toy else []
    if sizes:
        rest = sum(p.nbytes for p in model.parameters()) - sum(sizes)
        assert held(opt) <= 1.2 * (max(sizes) + rest) + 16 * 20  # padding


def test_lezo_does_not_make_it_grow():
    model = toy(torch.bfloat16)
    opt = zokern.LeZO(model, 1e-3, num_dropped=2, placement="stream")
    sizes = set()
    for _ in range(12):
        opt.step(model)
        sizes.add(held(opt))
    assert sizes == {extra_bytes(model)}


@pytest.mark.parametrize("dropped", [0, 30])
def test_opt_13b_needs_at_most_8_percent(dropped):
    tf = pytest.importorskip("transformers")
    config = tf.OPTConfig(
        hidden_size=5120,
        num_hidden_layers=40,
        num_attention_heads=40,
        ffn_dim=20480,
        vocab_size=50272,
        word_embed_proj_dim=5120,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        model = tf.OPTForCausalLM(config).to(torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 25e9
    assert 0.03 * size < extra_bytes(model) <= 0.08 * size


# ------------------------------------------------------------------------------------------------------- auto, messages


def sequential(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(dtype)


@pytest.mark.parametrize(
    ("params", "expected", "word"),
    [
        (toy, InPlace, None),
        (lambda: toy(torch.bfloat16), Stream, "'stream'.*of the model's memory"),
        (lambda: toy(torch.float16), Stream, "'stream'.*of the model's memory"),
        (lambda: seeded(TwoStacks), Stream, "'stream'"),
        (sequential, Shadow, "'shadow'.*no nn.ModuleList"),
        (lambda: sequential(torch.float32), InPlace, None),
        (lambda: toy(torch.bfloat16).parameters(), InPlace, "'inplace'.*pass the nn.Module"),
        (lambda: toy().parameters(), InPlace, None),
        (lambda: compiled_whole(toy(torch.bfloat16)), Shadow, "'shadow'.*torch.compile"),
        (lambda: compiled_inside(toy(torch.bfloat16)), Shadow, r"'shadow'.*layers\.2\.inner"),
    ],
)
def test_what_auto_chooses(params, expected, word, capsys, monkeypatch):
    monkeypatch.setattr(placements, "_told", set())
    given = params()
    opt = zokern.MeZO(given, 1e-3)
    assert type(opt._placement) is expected
    out, err = capsys.readouterr()
    assert out == ""
    if word is None:
        assert err == ""
    else:
        assert err.count("\n") == 1
        assert re.search(word, err)
    zokern.MeZO(params(), 1e-3)
    assert capsys.readouterr().err == ""  # said once


def test_stream_needs_a_module_with_blocks():
    with pytest.raises(ValueError, match=r"placement='stream'.*pass the nn\.Module"):
        zokern.MeZO(toy().parameters(), 1e-3, placement="stream")
    with pytest.raises(ValueError, match=r"Sequential has no nn\.ModuleList of equal blocks; use placement='shadow'"):
        zokern.MeZO(sequential(), 1e-3, placement="stream")
    with pytest.raises(ValueError, match=r"DataParallel; use placement='inplace'"):
        zokern.MeZO(nn.DataParallel(toy()), 1e-3, placement="stream")
    traced = toy()
    traced.norm = torch.jit.trace(traced.norm, torch.ones(2, WIDTH))
    with pytest.raises(ValueError, match=r"norm, a \w+; use placement='inplace'"):
        zokern.MeZO(traced, 1e-3, placement="stream")

"""placement="stream": models and hooks that it serves."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import methods
from tests.methods import METHODS
from tests.models import BLOCKS, HUGGING_FACE, WIDTH, WORDS, Block, Language, Toy, gpt2, seeded, toy
from tests.placement.streaming import (
    SHOWN,
    Recurrent,
    SharedModules,
    State,
    TwoStacks,
    assert_same_as_shadow,
    perturbed,
    run,
    same,
)
from zokern.noise import derive_seed
from zokern.placement import units


class SharedByBlocks(Toy):
    """One tensor in two blocks, and one of a block outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].inner.weight = self.layers[0].inner.weight
        self.norm.weight = self.layers[1].gain


class Attention(nn.Module):
    """Reads out_proj.weight and never calls out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


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
    assert sum(len(unit.sweep) for unit in units.units_of(opt.module, opt.active.sweep)[1:]) == 6
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

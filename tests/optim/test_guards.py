"""What goes wrong silently is told: steps that train nothing, modules that change, losses that do not react."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import zokern
from tests.methods import METHODS, build, equal, weights
from tests.models import Toy, linear, seeded, small, tokens, toy
from zokern import journal
from zokern.optim import causes

THREE = pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
X = torch.linspace(-1, 1, 40).reshape(5, 8)


def apart() -> Any:
    """Losses that differ from one another."""
    values = itertools.count()
    return lambda *_: 1.0 + 0.25 * (next(values) % 7)


def several(times: int, do: Callable[[], object]) -> None:
    for _ in range(times):
        do()


def mezo(params: Any, lr: float = 1e-2, **options: Any) -> zokern.MeZO:
    return zokern.MeZO(params, lr, **options)


# ---------------------------------------------------------------------------------------------------- nothing to train


@THREE
def test_a_step_of_a_frozen_module_is_an_error(placement):
    model = toy()
    opt = mezo(model, placement=placement)
    opt.step(model)
    model.requires_grad_(False)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"would train nothing: none of its .* requires_grad=True"):
        opt.step(model)
    assert equal(weights(model), before)
    assert opt.counters["steps"] == 1
    model.requires_grad_()  # the remedy
    opt.step(model)
    assert not equal(weights(model), before)


def test_a_list_with_nothing_trainable_is_refused_by_the_constructor():
    w = torch.zeros(4)
    with pytest.raises(ValueError, match="none of the 1 tensors has requires_grad=True"):
        mezo([w])
    opt = mezo([w.requires_grad_()], lr=0.1)  # the remedy
    opt.step(lambda: (w - 1).square().sum())
    assert bool((w != 0).any())


def test_a_list_of_before_the_adapter_is_refused_in_the_step():
    peft = pytest.importorskip("peft")
    model = linear(8, 16, 4)
    opt = mezo(model.parameters())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(RuntimeError, match=r"would train nothing.*get_peft_model"):
        opt.step(lambda: wrapped(X).square().mean())
    mezo(wrapped).step(lambda: wrapped(X).square().mean())  # the remedy


def test_blocks_that_are_all_left_out():
    model = toy()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("layers."))
    opt = mezo(model, layers=zokern.RandomBlocks(4))
    with pytest.raises(RuntimeError, match=r"lie in blocks that layers leaves out \(4 of 4\)"):
        opt.step(model)


def test_what_is_quantised_is_said(capsys, monkeypatch):
    model = linear(8, 16, 4)
    model[0].weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    monkeypatch.setattr(causes, "_announced", set())
    mezo(model)
    mezo(model)
    err = capsys.readouterr().err
    assert err.count("84 of the 84 floating-point numbers of Sequential are trained; 1 quantised tensors") == 1


# ---------------------------------------------------------------------------------------------- a module that changes


@THREE
def test_an_unfrozen_layer_is_trained(placement):
    model, twin = toy(), toy()
    model.layers[1].requires_grad_(False)
    opt = mezo(model, placement=placement)
    opt.step(model)
    model.layers[1].requires_grad_()
    before = weights(model.layers[1])
    opt.step(model)
    assert all(bool((a != b).any()) for a, b in zip(weights(model.layers[1]), before, strict=True))
    # with the ids of a module's parameters, as if it had never been frozen
    twin.layers[1].requires_grad_(False)
    other = mezo(twin.parameters(), module=twin, placement=placement)
    other.step(twin)
    twin.layers[1].requires_grad_()
    other.step(twin)
    assert equal(weights(model.layers[1]), weights(twin.layers[1]))


@THREE
@pytest.mark.parametrize("name", ["mezo-adam", "hizoo", "mezo-momentum"])
def test_an_unfrozen_layer_gets_fresh_states(placement, name):
    model = toy()
    model.norm.requires_grad_(False)
    opt = build(METHODS[name], model, placement=placement)
    opt.step(model)
    model.norm.requires_grad_()
    opt.step(model)
    assert set(opt.state[model.norm.weight]) == set(METHODS[name].states)


@THREE
def test_a_replaced_parameter_is_refused_by_name(placement):
    model = toy()
    opt = mezo(model, placement=placement)
    opt.step(model)
    model.norm = nn.LayerNorm(6)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"parameter norm\.weight is not in the module any more \(another tensor"):
        opt.step(model)
    assert equal(weights(model), before)
    mezo(model, placement=placement).step(model)  # the remedy


@THREE
def test_a_parametrized_weight_is_refused_by_name(placement):
    model = toy()
    opt = mezo(model, placement=placement)
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].inner)
    with pytest.raises(RuntimeError, match=r"layers\.0\.inner\.weight is not in the module any more \(nothing"):
        opt.step(model)


@THREE
def test_an_untied_head_is_taken_in(placement):
    model = toy()
    opt = mezo(model, placement=placement)
    opt.step(model)
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    before = weights(model.head)
    opt.step(model)
    assert not equal(weights(model.head), before)
    assert "head.weight" in opt._parameters.names(opt)[0]


def test_an_adapter_put_on_later_is_trained():
    peft = pytest.importorskip("peft")
    model = linear(8, 16, 4)
    opt = mezo(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    own = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    before = [p.detach().clone() for p in own]
    opt.step(lambda: wrapped(X).square().mean())
    assert all(bool((a != b).any()) for a, b in zip(own, before, strict=True))


def test_a_new_parameter_with_a_frozen_one_s_name():
    model = toy()
    model.norm.requires_grad_(False)
    opt = mezo(model)
    opt.step(model)
    model.norm = nn.LayerNorm(6)
    opt.step(model)
    names = opt._parameters.names(opt)[0]
    assert names.count("norm.weight") == 1
    assert bool((model.norm.weight != 1).any())


def test_lezo_finds_the_blocks_of_what_is_new():
    peft = pytest.importorskip("peft")
    model = toy()
    opt = zokern.LeZO(model, 1e-2, num_dropped=3, seed=5)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["inner"], r=2, init_lora_weights=False), model)
    before = weights(model)
    opt.step(model)
    moved = {
        name.split(".")[1]
        for (name, p), b in zip(model.named_parameters(), before, strict=True)
        if name.startswith("layers.") and bool((p.detach() != b).any())
    }
    assert len(moved) == 1


# ------------------------------------------------------------------------------------------------------ flat losses


@pytest.mark.parametrize("name", [n for n in METHODS if not METHODS[n].climbs])
def test_five_flat_steps_in_a_row_are_told_once(name):
    model = small()
    opt = build(METHODS[name], model)
    for _ in range(4):
        opt.step(lambda: 1.25)
    opt.step(apart())
    for _ in range(4):
        opt.step(lambda: 1.25)
    with pytest.warns(zokern.ZokernWarning, match="equal to the last bit") as told:
        several(2, lambda: opt.step(lambda: 1.25))
    assert len(told) == 1
    assert opt.flat_steps == 10
    assert "step function" not in str(told[0].message)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].climbs])
def test_flat_rewards_are_counted_only(name):
    opt = build(METHODS[name], small())
    for _ in range(7):
        opt.step(lambda: 1.0)
    assert opt.flat_steps == 7
    opt = mezo(small(), maximize=True)
    for _ in range(7):
        opt.step(lambda: 1.0)
    assert opt.flat_steps == 7


def test_losses_that_are_not_finite_are_not_flat():
    opt = mezo(small())
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        several(6, lambda: opt.step(lambda: math.nan))
    assert (opt.flat_steps, opt.skipped_steps) == (0, 6)


def test_flat_steps_are_saved():
    opt, other = mezo(small()), mezo(small())
    opt.step(lambda: 1.0)
    saved = opt.state_dict()
    other.load_state_dict(saved)
    assert other.flat_steps == 1
    del saved["zokern"]["flat"]  # of an earlier version
    other.load_state_dict(saved)
    assert other.flat_steps == 0


def flat_message(opt: Any, closure: Any) -> str:
    with pytest.warns(zokern.ZokernWarning) as told:
        several(5, lambda: opt.step(closure))
    (message,) = [str(w.message) for w in told if "last bit" in str(w.message)]
    return message.split("Likely causes: ")[1]


def test_the_causes_that_are_seen_come_first():
    model = small()
    assert flat_message(mezo(model), lambda: 3).startswith("(1) the loss is a step function")
    assert flat_message(mezo(model), lambda: torch.tensor(2.5, dtype=torch.bfloat16)).startswith(
        "(1) the loss arrives in bfl"
    )
    half = seeded(lambda: linear(8, 16, 4), torch.bfloat16)
    closure = lambda: half(X.bfloat16()).double().square().mean()  # noqa: E731
    assert flat_message(mezo(half, eps=1e-7), closure).startswith(
        "(1) eps 1e-07 is below the spacing of 0.weight's bfloat16"
    )
    mezo(half, eps=1e-2).step(closure)
    compiled = small()
    compiled.compile(backend="eager")
    assert flat_message(mezo(compiled), lambda: 0.3).startswith("(1) the module is compiled")
    assert flat_message(mezo(small()), lambda: 0.3).startswith("(1) the closure runs a copy or an engine")


def test_a_merged_adapter_is_the_first_cause():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(linear(8, 16, 4), peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    for placement in ("inplace", "shadow"):
        opt = mezo(model, placement=placement)
        model.merge_adapter()
        assert "(1) the adapter of base_model.model.0 is merged" in flat_message(opt, lambda: model(X).double().mean())
        model.unmerge_adapter()  # the remedy
        opt.step(lambda: model(X).double().mean())
        assert float(opt.metrics["projected_gradient"]) != 0.0


@pytest.mark.parametrize("placement", ["shadow", "inplace"])
def test_a_copy_is_told_and_the_module_itself_is_right(placement):
    import copy

    model = toy()
    other, opt = copy.deepcopy(model), mezo(model, placement=placement)
    assert "a copy" in flat_message(opt, other)
    opt.step(model)  # the remedy
    assert float(opt.metrics["projected_gradient"]) != 0.0


def test_functional_call_under_shadow_is_told_and_inplace_reaches_it():
    model = toy()
    taken = dict(model.named_parameters())

    def closure() -> Tensor:
        return torch.func.functional_call(model, taken, ())

    assert "functional_call" in flat_message(mezo(model, placement="shadow"), closure)
    opt = mezo(model, placement="inplace")  # the remedy
    opt.step(closure)
    assert float(opt.metrics["projected_gradient"]) != 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_loss_is_told_once_and_the_remedy_is_quiet(dtype):
    model = seeded(lambda: linear(8, 16, 4), torch.bfloat16)
    labels = torch.arange(5) % 4
    opt = mezo(model)
    with pytest.warns(zokern.ZokernWarning, match="returns its loss in") as told:
        several(3, lambda: opt.step(lambda: nn.functional.cross_entropy(model(X.bfloat16()), labels).to(dtype)))
    assert len(told) == 1
    quiet = mezo(model)
    quiet.step(lambda: nn.functional.cross_entropy(model(X.bfloat16()).float(), labels))


# ------------------------------------------------------------------------------------------------- paired randomness


class Dropping(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        tokens = torch.arange(11) if tokens is None else tokens
        x = self.head(self.drop(self.norm(self.run(self.embedding(tokens)))))
        return nn.functional.cross_entropy(x.double(), tokens.roll(1))


def masks(model: Dropping, opt: Any, batches: Any = None) -> list[list[bytes]]:
    """Of each forward of a step."""
    seen: list[bytes] = []
    handle = model.drop.register_forward_hook(lambda m, i, out: seen.append((out != 0).numpy().tobytes()))
    opt.step(lambda *b: model(*b), batches)
    handle.remove()
    n = 1 if batches is None else len(batches)
    return [seen[i : i + n] for i in range(0, len(seen), n)]


@THREE
def test_all_forwards_of_a_step_have_the_same_masks(placement):
    model = seeded(Dropping).train()
    opt = mezo(model, num_samples=2, placement=placement)
    torch.manual_seed(3)
    first, *others = masks(model, opt, [tokens(0), tokens(1), tokens(2)])
    assert len(set(first)) == 3
    assert all(one == first for one in others)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for i in range(3):
        model(tokens(i))
    assert torch.equal(after, torch.get_rng_state())  # the user's stream went on once
    again, *_ = masks(model, opt, [tokens(0), tokens(1), tokens(2)])
    assert again != first


def test_without_it_each_forward_draws_anew():
    model = seeded(Dropping).train()
    first, second = masks(model, mezo(model, paired_randomness=False))
    assert first != second
    model.eval()
    state = torch.get_rng_state()
    with pytest.warns(zokern.ZokernWarning, match="the closure draws from torch's random numbers"):
        mezo(model).step(lambda: torch.rand(()).double() + model())  # "auto" does nothing in eval mode, but tells
    twice = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(())
    assert not torch.equal(twice, torch.get_rng_state())


class OwnDropout(nn.Module):
    """Nothing of it says that it draws: neither its modules' classes nor a number's name."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.dropout(self.inner(x), 0.5, self.training).square().mean()


def test_draws_that_no_module_shows_are_told_and_the_advice_helps():
    x, model = torch.ones(3, 4), OwnDropout()
    opt = zokern.MeZO(model, lr=0.0)
    with pytest.warns(zokern.ZokernWarning, match="the closure draws from torch's random numbers") as found:
        opt.step(lambda: model(x))
    assert len(found) == 1
    opt.step(lambda: model(x))  # told once

    def spread(model, **settings):
        opt, found = zokern.MeZO(model, lr=0.0, **settings), []
        for _ in range(20):
            opt.step(lambda: model(x))
            found.append(abs(float(opt.metrics["projected_gradient"])))
        return max(found)

    apart = spread(model, paired_randomness=False)
    assert spread(model, paired_randomness=True) < 0.2 * apart
    assert spread(model.eval()) < 0.2 * apart
    data = torch.randn(50, 4)
    with pytest.warns(zokern.ZokernWarning, match="Draw the batch outside the closure"):
        mezo(model).step(lambda: model(data[torch.randint(50, (4,))]))
    batch = data[torch.randint(50, (4,))]
    mezo(model).step(lambda: model(batch))


def test_sampled_rewards_are_paired_on_request():
    seen: list[float] = []
    opt = zokern.ES([nn.Parameter(torch.ones(3))], 1e-2, num_directions=3, maximize=True, paired_randomness=True)
    opt.step(lambda: seen.append(float(torch.rand(()))) or seen[-1])
    assert len(set(seen)) == 1
    with pytest.raises(ValueError, match="paired_randomness is 'yes'; it must be 'auto', True or False"):
        mezo(small(), paired_randomness="yes")


def test_a_mode_without_dropout_is_not_paired():
    model = seeded(Dropping).train()
    model.drop.p = 0.0
    assert not mezo(model)._guards.pairs("auto")
    model.drop.p = 0.1
    assert mezo(model)._guards.pairs("auto")
    assert not mezo(model.eval())._guards.pairs("auto")
    attention = nn.MultiheadAttention(4, 2, dropout=0.1)
    assert mezo(attention)._guards.pairs("auto")


# ---------------------------------------------------------------------------------------------------------- buffers


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 2)
        self.register_buffer("table", torch.arange(5.0))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache.add_(1)
        return self.out(self.norm(x))


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
@pytest.mark.parametrize("bad", [False, True])
def test_a_step_leaves_buffers_as_they_were(placement, bad):
    model = seeded(Normed).train()
    with torch.no_grad():
        model(X)
    before = {name: b.clone() for name, b in model.named_buffers()}
    opt = mezo(model, placement=placement)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step(lambda: model(X).square().mean() * (math.nan if bad else 1.0))
    after = dict(model.named_buffers())
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "table"):
        assert torch.equal(after[name], before[name]), name
    assert bool((after["cache"] != before["cache"]).all())  # it is not saved, so it is the model's own affair
    kept = opt._guards.memory()
    assert sorted(t.numel() for t in kept) == [1, 8, 8]  # only what was seen changing
    model.eval()
    opt.step(lambda: model(X).square().mean())
    assert opt._guards.memory() == []
    model.train()
    with torch.no_grad():
        model(X)  # the remedy: running statistics of clean weights
    assert int(model.norm.num_batches_tracked) == int(before["norm.num_batches_tracked"]) + 1


def test_buffers_are_put_back_after_an_exception():
    model = seeded(Normed).train()
    before = model.norm.running_mean.clone()
    opt = mezo(model)

    def closure() -> Tensor:
        model(X)
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            opt.step(closure)
    assert torch.equal(model.norm.running_mean, before)
    opt.step(lambda: model(X).square().mean())
    assert torch.equal(model.norm.running_mean, before)


# ------------------------------------------------------------------------------------------------------- placement


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stepped", [False, True])
def test_auto_is_decided_anew_when_types_change(dtype, stepped):
    model = toy()
    opt = mezo(model, lr=0.0)
    assert opt.placement == "inplace"
    if stepped:
        opt.step(apart())
    model.to(dtype)
    before = weights(model)
    for _ in range(20):
        opt.step(lambda: model().double())
    assert opt.placement == "stream"
    assert equal(weights(model), before)
    model.float()
    assert opt.placement == "inplace"


def test_a_journal_s_header_has_the_placement_of_its_steps(tmp_path):
    model = toy()
    opt = mezo(model)
    model.bfloat16()
    with journal.write(opt, tmp_path / "a.zkj"):
        opt.step(lambda: model().double())
    assert journal.Reader(tmp_path / "a.zkj").header["placement"] == "stream"
    opt = mezo(small())
    with journal.write(opt, tmp_path / "b.zkj"):
        opt.step(opt.module)
        opt.module.bfloat16()
        with pytest.raises(RuntimeError, match="while a journal is written"):
            opt.step(opt.module)


class Peeking(Toy):
    """Reads a weight outside its block, which stream refuses."""

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        return super().forward(tokens) + self.layers[0].gain.double().mean()


def test_auto_falls_back_to_shadow_within_the_step(capsys):
    model, twin = seeded(Peeking, torch.bfloat16), seeded(Peeking, torch.bfloat16)
    opt, other = mezo(model), mezo(twin, placement="shadow")
    assert opt.placement == "stream"
    for _ in range(2):
        assert float(opt.step(model)) == float(other.step(twin))
    assert equal(weights(model), weights(twin))
    assert opt.placement == "shadow"
    assert opt.counters["steps"] == 2
    assert capsys.readouterr().err.count("goes on with 'shadow'") == 1
    with pytest.raises(RuntimeError, match="outside its block"):
        mezo(model, placement="stream").step(model)


@pytest.mark.parametrize("placement", ["auto", "shadow"])
def test_a_journal_of_a_run_that_fell_back_is_taken_up(placement, tmp_path):
    model, twin, again = (seeded(Peeking, torch.bfloat16) for _ in range(3))
    opt, path = mezo(model), tmp_path / "run.zkj"
    with zokern.journal.write(opt, path):
        several(2, lambda: opt.step(model))
    assert zokern.journal.Reader(path).header["placement"] == "stream"
    other = mezo(twin, placement=placement)
    with zokern.journal.resume(other, path):
        other.step(twin)
    opt.step(model)
    assert equal(weights(model), weights(twin))
    zokern.journal.replay(path, again)
    assert equal(weights(again), weights(twin))
    wrong = zokern.journal.resume(mezo(again, placement="inplace"), path)
    with pytest.raises(zokern.journal.JournalError, match="placement is 'stream' there, 'inplace' in this"), wrong:
        pass


def test_flat_steps_are_in_a_state_and_not_in_a_journal(tmp_path):
    model, twin, third = (linear(8, 16, 4) for _ in range(3))
    opt, path = mezo(model), tmp_path / "run.zkj"
    with zokern.journal.write(opt, path):
        several(3, lambda: opt.step(lambda: 1.5))
    assert opt.flat_steps == 3
    other = mezo(twin)
    with zokern.journal.resume(other, path):
        assert other.counters["steps"] == 3
        assert other.flat_steps == 0
        other.step(lambda: 1.5)
    assert other.flat_steps == 1
    loaded = mezo(third)
    loaded.load_state_dict(opt.state_dict())
    assert loaded.flat_steps == 3


def test_auto_does_not_fall_back_where_shadow_would_be_blind():
    import copy

    model = toy(torch.bfloat16)
    other, opt = copy.deepcopy(model), mezo(model)
    with pytest.raises(RuntimeError, match="called no block of the module that the optimizer was given"):
        opt.step(other)
    opt.step(model)  # the remedy
    assert opt.placement == "stream"


def test_stream_s_advice_for_functional_call():
    model = toy()
    taken = dict(model.named_parameters())
    opt = mezo(model, placement="stream")
    with pytest.raises(RuntimeError, match="was replaced inside the closure, as functional_call does"):
        opt.step(lambda: torch.func.functional_call(model, taken, ()))
    shadow = mezo(model, placement="shadow")  # first remedy: taken inside
    shadow.step(lambda: torch.func.functional_call(model, dict(model.named_parameters()), ()))
    inplace = mezo(model, placement="inplace")  # second
    inplace.step(lambda: torch.func.functional_call(model, taken, ()))
    assert float(shadow.metrics["projected_gradient"]) != 0.0 != float(inplace.metrics["projected_gradient"])


# -------------------------------------------------------------------------------------------------- first-order closures


@pytest.mark.parametrize("placement", ["inplace", "shadow"])
def test_a_closure_that_runs_backward_is_told_once(placement):
    model = linear(8, 16, 4)
    opt = mezo(model, placement=placement)

    def closure(detach: bool) -> Tensor:
        with torch.enable_grad():
            loss = model(X).square().mean()
            loss.backward()
        return loss.detach() if detach else loss

    with pytest.warns(zokern.ZokernWarning, match="runs backward") as told:
        several(3, lambda: opt.step(lambda: closure(True)))
    assert len(told) == 1
    with pytest.warns(zokern.ZokernWarning, match="runs backward"):
        mezo(model, placement=placement).step(lambda: closure(False))
    assert all(p.grad is None for p in getattr(opt._placement, "copies", ()))
    mezo(model, placement=placement).step(lambda: model(X).square().mean())  # the remedy is quiet


@THREE
def test_backward_without_a_graph_says_to_leave_it_out(placement):
    model = toy()

    def closure() -> Tensor:
        loss = model()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"leave out backward\(\)"):
        mezo(model, placement=placement).step(closure)


# --------------------------------------------------------------------------------------------------- step() of torch's


@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "hizoo"])
@pytest.mark.parametrize("stepped", [False, True])
def test_torch_s_checkpoint_functions_change_nothing(name, stepped):
    model = small()
    opt = build(METHODS[name], model)
    if stepped:
        opt.step(apart())
    before, steps = weights(model), opt.counters["steps"]
    get_state_dict(model, opt)
    assert equal(weights(model), before)
    assert opt.param_groups[0]["lr"] == METHODS[name].lr
    assert all(p.grad is None for p in model.parameters())
    assert opt.counters["steps"] == steps


@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_another_step_without_a_closure_names_the_remedies(lr):
    model = linear(8, 16, 4)
    opt = mezo(model, lr=lr)
    model(X).square().mean().backward()
    with pytest.raises(TypeError, match=r"ZOTrainer.*accelerate.*automatic_optimization"):
        opt.step()


# ------------------------------------------------------------------------------------------------------------ maximize


@pytest.mark.parametrize("name", list(METHODS))
def test_maximize_is_minus_the_loss(name):
    case = METHODS[name]
    up, down = small(), small()
    a = case.cls(up, case.lr, **{**case.settings, "maximize": True})
    b = case.cls(down, case.lr, **{**case.settings, "maximize": False})
    for step in range(3):
        with torch.no_grad():
            value = float(a.step(lambda step=step: up(tokens(step))))
        other = float(b.step(lambda step=step: -down(tokens(step))))
        assert value == -other
    assert equal(weights(up), weights(down))


def test_es_without_it_maximizes_and_warns():
    with pytest.warns(zokern.ZokernWarning, match="pass maximize=True"):
        opt = zokern.ES(small(), 1e-2, num_directions=3)
    assert opt.maximize
    assert not zokern.ES(small(), 1e-2, num_directions=3, maximize=False).maximize
    assert zokern.MeZO(small(), 1e-2).maximize is False


@pytest.mark.parametrize(("cls", "stored"), [(zokern.ES, True), (zokern.MeZO, False)])
def test_a_state_without_it_means_what_its_build_did(cls, stored):
    options = {"num_directions": 3} if cls is zokern.ES else {}
    opt = cls(small(), 1e-2, maximize=stored, **options)
    opt.step(apart())
    saved = opt.state_dict()
    del saved["zokern"]["options"]["maximize"]
    cls(small(), 1e-2, maximize=stored, **options).load_state_dict(saved)
    with pytest.raises(ValueError, match=f"maximize is {stored} in state_dict and {not stored} here"):
        cls(small(), 1e-2, maximize=not stored, **options).load_state_dict(saved)


# ------------------------------------------------------------------------------------------------ groups and a module


def halves(model: nn.Module) -> list[dict[str, Any]]:
    every = list(model.parameters())
    return [{"params": every[::2], "weight_decay": 0.1}, {"params": every[1::2], "lr": 2e-2}]


@THREE
def test_groups_of_a_module(placement):
    model, twin = toy(), toy()
    opt = zokern.MeZO(halves(model), 1e-2, eps=0.05, module=model, placement=placement)
    other = zokern.MeZO(halves(twin), 1e-2, eps=0.05, module=twin, placement="shadow")
    assert opt.placement == placement
    for _ in range(2):
        opt.step(model)
        other.step(twin)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(model), weights(twin), strict=True))
    assert opt._parameters.names(opt)[0][0] == "embedding.weight"
    named = zokern.MeZO(model.named_parameters(), 1e-2, module=model, placement=placement)
    plain = zokern.MeZO(toy(), 1e-2, placement=placement)
    assert named._parameters.names(named) == plain._parameters.names(plain)
    assert named._parameters.ids(named) == plain._parameters.ids(plain)


def test_groups_of_a_module_with_layers():
    model = toy()
    opt = zokern.MeZO(halves(model), 1e-2, module=model, layers=zokern.RandomBlocks(3))
    before = weights(model)
    opt.step(model)
    still = [bool((p.detach() == b).all()) for p, b in zip(model.parameters(), before, strict=True)]
    assert sum(still) == 3 * 5


def test_what_is_not_the_module_s_is_refused():
    model = toy()
    with pytest.raises(ValueError, match=r"group 0 has a tensor of shape \(3,\) that is no parameter of module, a Toy"):
        mezo([nn.Parameter(torch.ones(3))], module=model)
    with pytest.raises(ValueError, match="two modules"):
        mezo(model, module=toy())
    with pytest.raises(TypeError, match="module must be a Module object"):
        mezo(model.parameters(), module="model")


# ----------------------------------------------------------------------------------------------------------- numbers


def test_numbers_of_numpy():
    model = small()
    opt = zokern.MeZO(model, np.float32(1e-2), seed=np.int64(3), num_samples=np.int32(2), eps=np.float64(1e-2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: np.float32(0.5) ** step)
    values = iter([np.float32(1.5), np.int64(2), True, np.bool_(False), np.array(0.25), np.array([0.5]), 1, 2.0])
    for _ in range(2):
        opt.step(lambda: next(values))
        scheduler.step()
    assert opt.seed == 3
    assert type(opt.seed) is int
    opt.state_dict()
    with pytest.raises(TypeError, match="seed must be an int, got float64"):
        zokern.MeZO(model, 1e-2, seed=np.float64(3))


@pytest.mark.parametrize("name", list(METHODS))
def test_the_default_device_is_of_the_user_s_tensors(name):
    """ "meta" stands in for a GPU: what is to be on the host must say so."""
    model, twin = small(), small()
    losses = [1.0 + 0.1 * i for i in range(3 * METHODS[name].forwards)]
    for m, device in ((model, "meta"), (twin, "cpu")):
        opt, values = build(METHODS[name], m), iter(losses)
        torch.set_default_device(device)
        try:
            for _ in range(3):
                opt.step(lambda values=values: next(values))
            opt.load_state_dict(opt.state_dict())
        finally:
            torch.set_default_device(None)
    assert equal(weights(model), weights(twin))


@pytest.mark.parametrize("one", [X, {"a": X}, np.ones((2, 2)), "text"], ids=["tensor", "dict", "array", "str"])
def test_one_batch_in_place_of_a_list_is_refused(one):
    opt = mezo(small())
    with pytest.raises(TypeError, match=r"batches is one .*give a list, for example \[x\]"):
        opt.step(apart(), one)
    opt.step(apart(), [one])  # the remedy
    opt.step(apart(), X.split(2))


def test_names_of_wrapped_modules():
    model = toy()
    wrapped = torch.compile(model, backend="eager")
    opt = mezo(wrapped)
    opt.step(apart())
    saved = opt.state_dict()
    assert saved["zokern"]["names"][0][0].startswith("_orig_mod.")
    mezo(model).load_state_dict(saved)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = toy()

    mezo(Wrapper()).load_state_dict(saved)


def test_a_whole_compiled_closure_under_stream_runs_quietly():
    torch._dynamo.reset()
    model, twin = seeded(lambda: Toy(depth=10)), seeded(lambda: Toy(depth=10))
    compiled = torch.compile(model, backend="eager")
    opt, other = mezo(model, placement="stream"), mezo(twin, placement="stream")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "a step moves")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # torch 2.15's
        for _ in range(2):
            opt.step(compiled)
            other.step(twin)
    assert equal(weights(model), weights(twin))
    torch._dynamo.reset()


def test_running_statistics_that_change_past_their_versions_are_put_back() -> None:
    """A BatchNorm that counts no batches: nothing else of it is seen changing."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model[1].num_batches_tracked = None
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    before = [b.clone() for b in model.buffers()]
    opt = zokern.MeZO(model, 0.0)
    for _ in range(3):
        opt.step(lambda: model(x).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    model(x)
    assert not torch.equal(before[0], model[1].running_mean)  # they do change

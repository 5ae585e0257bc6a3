"""Modules of FSDP2: forwards see the perturbed weights of every tensor, and updates have the bits of a whole model's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.distributed.ranks import alone, build_alone, run
from tests.methods import METHODS, Case, given, scripted
from tests.models import Toy, seeded, small, tokens
from zokern import parts
from zokern.placement import fsdp

Shard = Callable[[nn.Module], None]


def nested(model: Any) -> None:
    """Blocks, and a root that has the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block)
    fully_shard(model)


def kept(model: Any) -> None:
    """Blocks that stay gathered, modules gathered together, one inside another."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.layers[0].inner)
    for block in model.layers:
        fully_shard(block, reshard_after_forward=False)
    fully_shard([model.norm, model.embedding])
    fully_shard(model)


def blocks_alone(model: Any) -> None:
    """What lies outside is whole on every rank."""
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block)


def root(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def untied(dtype: torch.dtype) -> Any:
    return seeded(lambda: Toy(depth=2, tied=False), dtype, 0.3)


def full(t: Any) -> Tensor:
    return t.detach().full_tensor() if parts.is_dtensor(t) else t.detach()


def same_weights(sharded: dict[str, Any], whole: dict[str, Any]) -> bool:
    return sharded.keys() == whole.keys() and all(torch.equal(full(p), whole[name]) for name, p in sharded.items())


def same(model: nn.Module, other: nn.Module) -> bool:
    return same_weights(dict(model.named_parameters()), dict(other.named_parameters()))


def seeing(model: nn.Module, step: int, values: Any, seen: list[float]) -> Callable[[], Tensor]:
    """A closure that runs the model, and returns what it is given."""
    losses = scripted(values)

    def closure() -> Tensor:
        seen.append(float(model(tokens(step))))
        return losses()

    return closure


def compared(
    case: Case, shard: Shard, make: Callable[[torch.dtype], Any], dtype: torch.dtype, rel: float = 1e-6, **options: Any
) -> list[str]:
    """What differs from a run of the whole model. rel: what its losses may."""
    model, other = make(dtype), make(dtype)
    shard(model)
    opt, theirs = build_alone(case, model, **options), build_alone(case, other, **options)
    found = []
    for step in range(2):
        seen: list[float] = []
        wanted: list[float] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step(seeing(model, step, given(case, step), seen))
            theirs.step(seeing(other, step, given(case, step), wanted))
        if seen != pytest.approx(wanted, rel=rel):
            found.append(f"losses of step {step}: {seen}, and not {wanted}")
        if len(set(wanted)) < 2:
            found.append("the losses do not react")
        model(tokens(9))  # between two steps, which leaves the root gathered
    if not same_weights(opt.weights(), theirs.weights()):
        found.append("weights")
    if opt.counters["passes"] != theirs.counters["passes"]:
        found.append("passes")
    return found


def every_case(
    names: list[str], shard: Shard, dtype: torch.dtype, placements: list[str], options: dict[str, Any] | None = None
) -> list[str]:
    found = []
    for name in names:
        for placement in placements:
            if placement == "stream" and ("curved" in name or name.startswith("hizoo")):
                continue
            wrong = compared(METHODS[name], shard, untied, dtype, placement=placement, **(options or {}))
            found += [f"{name} {placement}: {one}" for one in wrong]
    return found


@pytest.mark.parametrize("shard", [nested, kept, blocks_alone, root], ids=lambda shard: shard.__name__)
def test_forwards_and_updates_are_those_of_a_whole_model(shard: Shard) -> None:
    names, placements = ["mezo", "hizoo"], ["inplace", "shadow", "stream"]
    assert run(2, every_case, names, shard, torch.float32, placements) == [[], []]


def test_methods_with_sixteen_bits() -> None:
    names = ["mezo-adam", "hizoo-3", "helene-by-layer", "gv-kept", "greedy-curved", "fzoo", "es-antithetic"]
    assert run(2, every_case, names, nested, torch.bfloat16, ["auto"]) == [[]] * 2


def test_ranks_without_an_element_of_some_tensors() -> None:
    assert run(5, every_case, ["mezo-adam"], nested, torch.float32, ["stream"]) == [[]] * 5


def parts_of_a_batch() -> list[bool]:
    """Each rank its own part of the batch, as FSDP2 does it; against a whole model and both parts."""
    found = []
    for placement in ("inplace", "shadow", "stream"):
        model, other = untied(torch.float32), untied(torch.float32)
        nested(model)
        opt = zokern.MeZO(model, 1e-3, eps=0.1, placement=placement)
        theirs = alone(zokern.MeZO, other, 1e-3, eps=0.1, placement=placement)
        for step in range(2):
            mine = tokens(2 * step + torch.distributed.get_rank())
            loss = opt.step(lambda model=model, mine=mine: model(mine))
            wanted = theirs.step(lambda batch, other=other: other(batch), [tokens(2 * step), tokens(2 * step + 1)])
            found.append(float(loss) == pytest.approx(float(wanted), rel=1e-6))
        pairs = [(full(p), q) for p, q in zip(opt.weights().values(), theirs.weights().values(), strict=True)]
        found.append(all(torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p, q in pairs))
    return found


def test_each_rank_has_its_part_of_the_batch() -> None:
    assert run(2, parts_of_a_batch) == [[True] * 9] * 2


def mixed(model: Any) -> None:
    """float32 shards, gathered in 16 bits."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def offloaded(model: Any) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    for block in model.layers:
        fully_shard(block, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def policies() -> list[str]:
    placements = ["inplace", "shadow", "stream"]
    found = every_case(["mezo"], offloaded, torch.float32, placements)
    return found + every_case(["mezo"], mixed, torch.float32, placements, {"rel": 1e-2})


def test_policies_of_fsdp() -> None:
    assert run(2, policies) == [[], []]


def more_of_it() -> list[str]:
    found = compared(METHODS["mezo-adam"], nested, small, torch.bfloat16, layers=zokern.RandomBlocks(1))  # tied
    found += compared(METHODS["es"], nested, small, torch.bfloat16, distribution=zokern.LowRank(1))
    return found


def test_tied_weights_and_blocks_left_out_and_low_rank() -> None:
    assert run(2, more_of_it) == [[], []]


# ------------------------------------------------------------------------------------------------- what forwards may see


def reacting(placement: str) -> list[str]:
    """Each tensor alone, with two micro-batches, so that a block is gathered twice under one perturbation."""
    found = []
    for i, (name, _) in enumerate(untied(torch.float32).named_parameters()):
        seen = []
        for shard in (nested, None):
            model = untied(torch.float32)
            for p in model.parameters():
                p.requires_grad_(False)
            list(model.parameters())[i].requires_grad_()
            if shard is not None:
                shard(model)
            losses: list[float] = []
            opt = alone(zokern.MeZO, model, 1e-3, eps=0.3, placement=placement)

            def closure(batch: Tensor, model: nn.Module = model, losses: list[float] = losses) -> Tensor:
                losses.append(model(batch).item())
                return torch.tensor(losses[-1])

            opt.step(closure, [tokens(0), tokens(1)])
            seen.append(losses)
        if seen[0] != pytest.approx(seen[1], rel=1e-6) or seen[0][0] == seen[0][2] or seen[0][1] == seen[0][3]:
            found.append(f"{name}: {seen}")
    return found


@pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
def test_the_loss_reacts_to_each_tensor(placement: str) -> None:
    assert run(2, reacting, placement) == [[], []]


def exact() -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    found: list[Any] = []
    for placement in ("shadow", "stream"):
        model = untied(torch.bfloat16)
        nested(model)
        before = [parts.local(p).clone() for p in model.parameters()]
        opt = alone(zokern.MeZO, model, 0.0, eps=0.3, placement=placement, num_samples=2)
        gathered: list[int] = []
        for block in model.layers:
            block.inner.register_forward_hook(lambda *_, m=model, seen=gathered: seen.append(count_gathered(m)))
        opt.step(lambda model=model: model(tokens(0)))
        same_bits = all(map(torch.equal, before, map(parts.local, model.parameters())))
        found.append((same_bits, count_gathered(model), max(gathered)))
        found.append(sum(t.numel() for t in opt._placement.memory()))
        found.append(any(m._forward_pre_hooks for m in model.modules() if not isinstance(m, FSDPModule)))
    return found


def count_gathered(model: nn.Module) -> int:
    """How many calls of fully_shard have gathered weights now."""
    states = fsdp.states_of(fsdp.modules_of(model))
    return sum(not group.is_sharded for state in states for group in fsdp.groups_of(state))


def test_exact_placements_keep_every_bit_and_gather_one_block_at_a_time() -> None:
    for shadow, copies, hooks, stream, nothing, others in run(2, exact):
        assert shadow == stream == (True, 0, 2)  # a block and the root
        assert not hooks
        assert not others
        assert copies > 0
        assert nothing == 0


def broken() -> list[str]:
    """A closure that raises inside a block, at its second call and at others, leaves nothing behind."""
    found = []
    for placement in ("inplace", "shadow", "stream"):
        for shard in (nested, kept):
            model, other = untied(torch.float32), untied(torch.float32)
            shard(model)
            opt = alone(zokern.MeZO, model, 1e-3, eps=0.1, placement=placement)
            theirs = alone(zokern.MeZO, other, 1e-3, eps=0.1, placement="shadow")
            before = [parts.local(p).clone() for p in model.parameters()]
            for at in range(3):
                handle = model.layers[1].inner.register_forward_hook(_raising(at))
                with pytest.raises(RuntimeError, match="in a block"):
                    opt.step(lambda model=model: model(tokens(0)) + model(tokens(1)))
                handle.remove()
                near = map(torch.allclose, before, map(parts.local, model.parameters()))
                equal = map(torch.equal, before, map(parts.local, model.parameters()))
                if not all(near if placement == "inplace" else equal):
                    found.append(f"{placement} {shard.__name__}: weights")
            loss, wanted = (
                opt.step(lambda model=model: model(tokens(2))),
                theirs.step(lambda other=other: other(tokens(2))),
            )
            if float(loss) != pytest.approx(float(wanted), rel=1e-5):
                found.append(f"{placement} {shard.__name__}: {float(loss)} {float(wanted)}")
    return found


def _raising(at: int) -> Any:
    calls = iter(range(9))

    def hook(*_: Any) -> None:
        if next(calls) == at:
            raise RuntimeError("in a block")

    return hook


def test_a_closure_that_raises_leaves_clean_weights_and_a_model_that_runs() -> None:
    assert run(2, broken) == [[], []]


def prefetched() -> list[str]:
    def shard(model: Any) -> None:
        nested(model)
        model.layers[0].set_modules_to_forward_prefetch([model.layers[1]])

    return every_case(["mezo"], shard, torch.float32, ["inplace", "shadow", "stream"])


def test_modules_that_gather_others_ahead() -> None:
    assert run(2, prefetched) == [[], []]


def not_called() -> list[str]:
    model = untied(torch.bfloat16)
    nested(model)
    told = []

    def closure() -> Tensor:
        return model.layers[0](torch.ones(3, 6).bfloat16()).float().square().mean()

    opt = alone(zokern.MeZO, model, 1e-3, placement="stream")
    with pytest.raises(RuntimeError) as error:
        opt.step(closure)
    told.append(str(error.value))
    opt = alone(zokern.MeZO, model, 1e-3)
    opt.step(closure)
    told.append(opt.placement)
    return told


def test_a_module_that_the_closure_leaves_out_is_refused_by_name() -> None:
    for refusal, placement in run(2, not_called):
        assert "did not call FSDPToy, layers.1, whose perturbed weights were therefore not seen" in refusal
        assert placement == "shadow"


def penalised() -> list[Any]:
    """A penalty on a block's weights, which are shards there."""
    told: list[Any] = []
    for place in ("before", "after"):
        model = untied(torch.float32)
        nested(model)

        def closure(model: Any = model, place: str = place) -> Tensor:
            weight = model.layers[0].inner.weight
            penalty = weight.full_tensor().square().sum() if place == "before" else 0.0
            loss = model(tokens(0))
            return loss + (penalty if place == "before" else weight.to_local().square().sum())

        before = [parts.local(p).clone() for p in model.parameters()]
        opt = alone(zokern.MeZO, model, 1e-3, eps=0.3, placement="stream")
        with pytest.raises(RuntimeError) as error:
            opt.step(closure)
        told.append(str(error.value))
        told.append(all(map(torch.equal, before, map(parts.local, model.parameters()))))
        told.append(all(map(parts.is_dtensor, model.parameters())))
    return told


def test_shards_read_outside_their_block_are_refused_by_name() -> None:
    for first, kept, shards, second, *others in run(2, penalised):
        assert "layers.0.inner.weight was used outside its block's forward" in first
        assert first == second
        assert [kept, shards, *others] == [True] * 4


def saving_inside() -> list[bool]:
    found = []
    for shard in (nested, kept, blocks_alone):
        model = untied(torch.float32)
        shard(model)
        saved: list[Any] = []
        opt = alone(zokern.MeZO, model, 0.0, eps=0.3, placement="stream")
        before = {name: full(p).clone() for name, p in model.named_parameters()}

        def closure(model: nn.Module = model, saved: list[Any] = saved) -> Tensor:
            first = model(tokens(0))
            saved.append({name: full(t).clone() for name, t in model.state_dict().items()})
            saved.append(bool(model(tokens(0)) == first))
            return first

        opt.step(closure)
        found += [all(torch.equal(before[name], one[name]) for name in before) for one in saved[::2]] + saved[1::2]
    return found


def test_a_state_dict_inside_the_closure_is_of_the_weights() -> None:
    assert run(2, saving_inside) == [[True] * 12] * 2


def refusals() -> list[str]:
    told = []
    model = untied(torch.float32)
    nested(model)
    for options in (
        {"placement": "forward", "distribution": zokern.LowRank(1)},
        {"placement": "shadow", "pipelined": True},
        {"placement": "stream", "pipelined": True},
    ):
        with pytest.raises(ValueError, match=r"placement|pipelined") as error:
            alone(zokern.MeZO, model, 1e-3, **options)
        told.append(str(error.value))
    with pytest.raises(ValueError, match=r"check: embedding\.weight is a DTensor, cut up over ranks"):
        zokern.check(zokern.MeZO(model, 1e-3), lambda: model(tokens(0)))
    with pytest.raises(ValueError, match=r"give the nn\.Module, or module= with its parameters"):
        alone(zokern.MeZO, model.parameters(), 1e-3)
    alone(zokern.MeZO, model.parameters(), 1e-3, module=model)
    with pytest.raises(ValueError, match="use placement='shadow'") as error:
        alone(zokern.HiZOO, model, 1e-3, placement="stream")
    told.append(str(error.value))
    opt = alone(zokern.MeZO, model, 1e-3, placement="shadow")
    with pytest.raises(RuntimeError, match="inside the closure") as caught:
        opt.step(lambda: len(model.state_dict()))
    told.append(str(caught.value))
    return told


def test_what_cannot_be_is_refused() -> None:
    for told in run(2, refusals):
        assert "use placement='stream' or 'shadow'" in told[0]
        assert told[1] == told[2]
        assert "there are none of a module of FSDP2; leave it out" in told[1]


# ------------------------------------------------------------------------------------------- sharded when the optimizer is


def sharded_later() -> list[Any]:
    found: list[Any] = []
    model = untied(torch.float32)
    opt = alone(zokern.MeZO, model, 1e-3)
    nested(model)
    with pytest.raises(RuntimeError) as error:
        opt.step(lambda: model(tokens(0)))
    found.append(str(error.value))
    # accelerate puts the shards into the groups
    case = METHODS["mezo-adam"]
    model, other = untied(torch.bfloat16), untied(torch.bfloat16)
    opt, theirs = (
        build_alone(case, model, layers=zokern.RandomBlocks(1)),
        build_alone(case, other, layers=zokern.RandomBlocks(1)),
    )
    names = {id(p): name for name, p in model.named_parameters()}
    nested(model)
    now = dict(model.named_parameters())
    for group in opt.param_groups:
        group["params"] = [now[names[id(p)]] for p in group["params"]]
    for step in range(3):
        opt.step(seeing(model, step, given(case, step), []))
        theirs.step(seeing(other, step, given(case, step), []))
    found += [same(model, other), opt.layout() == theirs.layout(), opt.placement, opt._placement.memory()]
    return found


def test_a_model_that_is_sharded_after_the_optimizer_was_made() -> None:
    for refusal, weights, layout, placement, memory in run(2, sharded_later):
        assert "make a new optimizer after changing the module" in refusal
        assert weights
        assert layout
        assert placement == "stream"
        assert memory == []


def of_gathered() -> list[bool]:
    """A root that is gathered when the optimizer is made, which is given groups."""
    case = METHODS["mezo"]
    model, other = untied(torch.float32), untied(torch.float32)
    nested(model)
    with torch.no_grad():
        model(tokens(0))
    opt = build_alone(case, model)
    named = [(name, p) for name, p in other.named_parameters()]
    theirs = build_alone(case, [{"params": named}], module=other)
    for step in range(2):
        opt.step(seeing(model, step, given(case, step), []))
        theirs.step(seeing(other, step, given(case, step), []))
    return [same(model, other)]


def test_a_root_that_is_gathered_when_the_optimizer_is_made() -> None:
    assert run(2, of_gathered) == [[True], [True]]

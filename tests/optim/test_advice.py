"""What messages advise is followed: what was wrong raises it, and the same call, changed as it says, works.

Other advice is followed beside the fault that it is about: tests/optim/test_guards.py,
tests/checking/test_faults.py, tests/finetune/.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import zokern
from tests.models import toy
from zokern.kinds import Number
from zokern.optim.base import ZerothOrderOptimizer
from zokern.settings import setting


class Advice(NamedTuple):
    """says: what the message must have. wrong, right: without arguments; right is what it says to do instead."""

    says: str
    wrong: Callable[[], object]
    right: Callable[[], object]


EVERY: dict[str, Callable[[Path], Advice]] = {}


def advice(function: Callable[[Path], Advice]) -> Callable[[Path], Advice]:
    EVERY[function.__name__.replace("_", " ")] = function
    return function


@pytest.mark.parametrize("name", EVERY)
def test_it_helps(name: str, tmp_path: Path) -> None:
    says, wrong, right = EVERY[name](tmp_path)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=says):
        wrong()
    assert right() is not False


def mezo(model: Any, **options: Any) -> zokern.MeZO:
    return zokern.MeZO(model, options.pop("lr", 1e-2), **options)


def moved(opt: Any, closure: Any, *args: Any, **named: Any) -> bool:
    """Whether a step trains something."""
    before = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    opt.step(closure, *args, **named)
    after = [p for group in opt.param_groups for p in group["params"]]
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def squares(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.ones(3, 4)
    return lambda: model(x).square().mean()


# ------------------------------------------------------------------------------------------------------ what is trained


@advice
def float64_weights_are_converted(_: Path) -> Advice:
    model = line()
    return Advice("or convert them", lambda: mezo(model.double()), lambda: moved(mezo(model.float()), squares(model)))


@advice
def strided_weights_are_made_contiguous(_: Path) -> Advice:
    p = nn.Parameter(torch.arange(12.0).view(3, 4).t())

    def right() -> bool:
        p.data = p.data.contiguous()
        return moved(mezo([p]), lambda: p.square().sum())

    return Advice(r"p\.data = p\.data\.contiguous\(\) before the optimizer is made", lambda: mezo([p]), right)


@advice
def one_tensor_is_put_in_a_list(_: Path) -> Advice:
    p = torch.ones(3, requires_grad=True)
    return Advice("an iterable of tensors", lambda: mezo(p), lambda: moved(mezo([p]), lambda: p.square().sum()))


@advice
def nothing_that_requires_grad_is_given_it(_: Path) -> Advice:
    p = torch.ones(3)
    return Advice(
        r"call requires_grad_\(\)",
        lambda: mezo([p]),
        lambda: moved(mezo([p.requires_grad_()]), lambda: p.square().sum()),
    )


@advice
def two_names_alike_are_made_two(_: Path) -> Advice:
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    return Advice(
        "give each a name of its own",
        lambda: mezo([("a", a), ("a", b)]),
        lambda: moved(mezo([("a", a), ("b", b)]), lambda: a.sum() + b.sum()),
    )


@advice
def a_tensor_of_no_module_leaves_it_out(_: Path) -> Advice:
    model, p = line(), torch.ones(3, requires_grad=True)
    return Advice(
        "leave module= out",
        lambda: zokern.MeZO([p], 1e-2, module=model),
        lambda: moved(zokern.MeZO([p], 1e-2), lambda: p.square().sum()),
    )


@advice
def two_modules_become_groups_of_one(_: Path) -> Advice:
    model = nn.Sequential(line(), nn.Linear(2, 1))
    return Advice(
        "give one, or groups of the parameters of `module`",
        lambda: zokern.MeZO(model[0], 1e-2, module=model),
        lambda: moved(zokern.MeZO([{"params": model[0].parameters()}], 1e-2, module=model), squares(model)),
    )


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = tmp_path_factory.mktemp("mesh") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_shards_of_one_rank_are_trained(mesh: Any) -> None:
    model = line()
    fully_shard(model, mesh=mesh)
    assert moved(mezo(model), squares(model))


def test_weights_without_numbers_are_refused_and_the_way_on_works() -> None:
    with FakeTensorMode():
        model = line()
        with pytest.raises(TypeError, match=r"is a FakeTensor, .*; make the model outside FakeTensorMode"):
            mezo(model)
    model = line()
    with FakeTensorMode():
        opt = mezo(model)
    assert moved(opt, squares(model))


@pytest.mark.parametrize("dim", [0, 1])
def test_noise_of_a_shard_is_made_in_its_local_tensor(mesh: Any, dim: int) -> None:
    shape = torch.Size((3, 6))
    sharded = distribute_tensor(torch.zeros(shape), mesh, [Shard(dim)])
    with pytest.raises(TypeError, match=r"for a DTensor: to_local\(\), with `offsets` and `strides`"):
        zokern.add_noise_([sharded], tensor_ids=[0], seeds=[3], coefs=[1.0])
    local, (first, column) = compute_local_shape_and_global_offset(shape, mesh, [Shard(dim)])
    assert local == shape
    zokern.add_noise_(
        [sharded.to_local()], tensor_ids=[0], seeds=[3], coefs=[1.0], offsets=[first * 6 + column], strides=[6]
    )
    want = torch.zeros(shape)
    zokern.add_noise_([want], tensor_ids=[0], seeds=[3], coefs=[1.0])
    assert torch.equal(sharded.full_tensor(), want)


@advice
def a_replaced_parameter_takes_a_new_optimizer(_: Path) -> Advice:
    model = line()
    opt = mezo(model)
    opt.step(squares(model))
    model.weight = nn.Parameter(torch.ones(2, 4))
    return Advice(
        "make a new optimizer after changing the module",
        lambda: opt.step(squares(model)),
        lambda: moved(mezo(model), squares(model)),
    )


# ------------------------------------------------------------------------------------------------- layers and placements


@advice
def layers_take_the_module(_: Path) -> Advice:
    model, layers = toy(), zokern.RandomBlocks(1)
    return Advice(
        "pass the nn.Module instead of its parameters",
        lambda: mezo(list(model.parameters()), layers=layers),
        lambda: moved(mezo(model, layers=layers), model),
    )


@advice
def blocks_outside_a_list_are_named(_: Path) -> Advice:
    model = nn.Sequential(line(), nn.Linear(2, 2))
    layers = zokern.RandomBlocks(1, blocks=["0", "1"])
    return Advice(
        r"name them, for example RandomBlocks\(num_dropped, blocks=",
        lambda: mezo(model, layers=zokern.RandomBlocks(1)),
        lambda: moved(mezo(model, layers=layers), squares(model)),
    )


@advice
def stream_without_blocks_is_shadow(_: Path) -> Advice:
    model = line()
    return Advice(
        "use placement='shadow'",
        lambda: mezo(model, placement="stream"),
        lambda: moved(mezo(model, placement="shadow"), squares(model)),
    )


@advice
def shadow_takes_the_module(_: Path) -> Advice:
    model = line()
    return Advice(
        "pass the nn.Module, not its parameters",
        lambda: mezo(list(model.parameters()), placement="shadow"),
        lambda: moved(mezo(model, placement="shadow"), squares(model)),
    )


@advice
def a_script_is_perturbed_in_place(_: Path) -> Advice:
    model = torch.jit.script(line())
    return Advice(
        "use placement='inplace'",
        lambda: mezo(model, placement="shadow"),
        lambda: moved(mezo(model, placement="inplace"), squares(model)),
    )


@advice
def pipelined_takes_copies(_: Path) -> Advice:
    model = line()
    return Advice(
        "use placement='shadow' or 'stream' with an nn.Module",
        lambda: mezo(model, pipelined=True, placement="inplace"),
        lambda: moved(mezo(model, pipelined=True, placement="shadow"), squares(model)),
    )


@advice
def a_compiled_module_s_plain_one_streams(_: Path) -> Advice:
    model = toy()
    compiled = torch.compile(model, backend="eager")
    return Advice(
        "or give the module that is not compiled",
        lambda: mezo(compiled, placement="stream"),
        lambda: moved(mezo(model, placement="stream"), model) and moved(mezo(compiled, placement="shadow"), compiled),
    )


class Keeps(nn.Module):
    """Blocks that hand a view of their weight on, or a copy of it."""

    def __init__(self, cloned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.cloned = cloned

        def keep(block: nn.Module, args: Any, out: Tensor) -> None:
            self.held.append(block.weight[0].clone() if self.cloned else block.weight[0])

        for layer in self.layers:
            layer.register_forward_hook(keep)

    def forward(self) -> Tensor:
        self.held: list[Tensor] = []
        x = torch.ones(2, 4)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean() + torch.stack(self.held).sum()


@advice
def a_held_view_is_cloned_or_shadow_serves(_: Path) -> Advice:
    held, cloned = Keeps(False), Keeps(True)

    def right() -> None:
        steps = [mezo(held, placement="shadow"), mezo(cloned, placement="stream")]
        losses = [float(opt.step(model)) for opt, model in zip(steps, (held, cloned), strict=True)]
        assert losses[0] == losses[1]
        assert all(map(torch.equal, held.parameters(), cloned.parameters()))

    return Advice(
        "use placement='shadow' for this model, or clone it", lambda: mezo(held, placement="stream").step(held), right
    )


@advice
def freezing_is_switched_off(_: Path) -> Advice:
    """Where views are held as a compiler that freezes weights holds them."""
    from torch._inductor import config

    model = Keeps(False)

    def wrong() -> None:
        with config.patch(freezing=True):
            mezo(model, placement="stream").step(model)

    return Advice(
        "freezing makes constants.*switch it off", wrong, lambda: moved(mezo(model, placement="shadow"), model)
    )


# ------------------------------------------------------------------------------------------------------------- closures


@advice
def a_vector_of_losses_is_averaged(_: Path) -> Advice:
    model, x = line(), torch.ones(3, 4)
    return Advice(
        "take its mean",
        lambda: mezo(model).step(lambda: model(x).square().sum(1)),
        lambda: moved(mezo(model), lambda: model(x).square().sum(1).mean()),
    )


@advice
def a_batch_that_is_a_tensor_is_listed(_: Path) -> Advice:
    model, x = line(), torch.ones(16, 4)

    def loss(batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    return Advice(
        r"\[x\] for one batch or x\.split\(8\)",
        lambda: mezo(model).step(loss, x),
        lambda: moved(mezo(model), loss, [x]) and moved(mezo(model), loss, x.split(8)),
    )


@advice
def weights_of_batches_go_with_batches(_: Path) -> Advice:
    model, x = line(), torch.ones(3, 4)
    return Advice(
        "they go in pairs",
        lambda: mezo(model).step(squares(model), batch_weights=[1.0]),
        lambda: moved(mezo(model), lambda b: model(b).square().mean(), [x], batch_weights=[1.0]),
    )


@advice
def weights_of_losses_go_with_names(_: Path) -> Advice:
    model = line()
    loss = squares(model)
    return Advice(
        "return a dict of losses by name",
        lambda: mezo(model).step(loss, loss_weights={"task": 0.5}),
        lambda: moved(mezo(model), lambda: {"task": loss()}, loss_weights={"task": 0.5}),
    )


@advice
def names_of_losses_agree(_: Path) -> Advice:
    model = line()
    loss = squares(model)
    return Advice(
        "make the names agree",
        lambda: mezo(model).step(lambda: {"task": loss()}, loss_weights={"tsak": 0.5}),
        lambda: moved(mezo(model), lambda: {"task": loss()}, loss_weights={"task": 0.5}),
    )


@advice
def a_step_in_a_step_comes_after_it(_: Path) -> Advice:
    model = line()
    opt, loss = mezo(model), squares(model)

    def wrong() -> None:
        opt.step(lambda: opt.step(loss))

    return Advice("comes before the step or after it", wrong, lambda: moved(opt, loss) and moved(opt, loss))


@advice
def each_thread_has_its_optimizer(_: Path) -> Advice:
    model = line()
    opt, loss = mezo(model), squares(model)

    def elsewhere(do: Callable[[], object]) -> None:
        raised: list[BaseException] = []

        def run() -> None:
            try:
                do()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    def beside(do: Callable[[], object]) -> Callable[[], Tensor]:
        done: list[bool] = []

        def closure() -> Tensor:
            if not done:
                done.append(True)
                elsewhere(do)
            return loss()

        return closure

    other = line()
    return Advice(
        "give each thread an optimizer and weights of its own",
        lambda: opt.step(beside(lambda: opt.step(loss))),
        lambda: moved(opt, beside(lambda: mezo(other).step(squares(other)))),
    )


@advice
def a_graph_on_a_cpu_is_a_plain_step(_: Path) -> Advice:
    model = line()
    opt, x = mezo(model), torch.ones(3, 4)

    def loss(batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    return Advice(r"use optimizer\.step", lambda: zokern.GraphedStep(opt, loss, x), lambda: moved(opt, lambda: loss(x)))


# ------------------------------------------------------------------------------------------------------------- settings


@advice
def adamezo_samples_one_direction(_: Path) -> Advice:
    model = line()
    return Advice(
        "works with 1",
        lambda: mezo(model, update="adamezo", num_samples=2),
        lambda: moved(mezo(model, update="adamezo", num_samples=1), squares(model)),
    )


@advice
def scale_is_left_out(_: Path) -> Advice:
    model = line()
    return Advice(
        "leave scale out",
        lambda: mezo(model, update="adam", scale="released"),
        lambda: moved(mezo(model, update="adam"), squares(model)),
    )


@advice
def a_floor_has_a_number_for_each(_: Path) -> Advice:
    model = line()
    return Advice(
        "floor has 3 numbers for 2 trainable parameters; give one for each",
        lambda: zokern.HELENE(model, 1e-2, batch_size=1, floor=[1.0] * 3),
        lambda: moved(zokern.HELENE(model, 1e-2, batch_size=1, floor=[1.0] * 2), squares(model)),
    )


@advice
def es_is_told_which_way(_: Path) -> Advice:
    model = line()
    made: list[Any] = []

    def wrong() -> None:
        with pytest.warns(zokern.ZokernWarning) as told:
            zokern.ES(model, 1e-2, num_directions=3)
        raise ValueError(str(told[0].message))

    def right() -> None:
        for flag in (True, False):
            made.append(zokern.ES(model, 1e-2, num_directions=3, maximize=flag))

    return Advice("pass maximize=True for a reward, or maximize=False for a loss", wrong, right)


@advice
def an_eps_that_is_too_large_is_made_smaller(_: Path) -> Advice:
    model = line().half()
    opt = mezo(model, placement="shadow")

    def wrong() -> None:
        opt.param_groups[0]["eps"] = 1e6
        opt.step(squares(model.half()))

    def right() -> None:
        opt.param_groups[0]["eps"] = 1e-2
        assert moved(opt, lambda: sum(p.float().square().sum() for p in model.parameters()))

    return Advice(r"it must be in \[", wrong, right)


@advice
def a_setting_called_as_an_attribute_takes_an_alias(_: Path) -> Advice:
    def wrong() -> None:
        class Named(ZerothOrderOptimizer):
            state_spec: float = setting(default=1.0, kind=Number(0.0, 1.0), help="A number.")  # type: ignore[assignment]

    def right() -> None:
        class Aliased(ZerothOrderOptimizer):
            own: float = setting(default=1.0, kind=Number(0.0, 1.0), alias="state_spec", help="A number.")

    return Advice("choose another, and alias=", wrong, right)


# ---------------------------------------------------------------------------------------------------- saved and written


@advice
def an_optimizer_is_copied_by_its_state(_: Path) -> Advice:
    model = line()
    opt = mezo(model, update="adam")
    opt.step(squares(model))

    def right() -> None:
        other = copy.deepcopy(model)
        new = mezo(other, update="adam", seed=5)
        new.load_state_dict(opt.state_dict())
        new.step(squares(other))
        opt.step(squares(model))
        assert torch.equal(model.weight, other.weight)

    return Advice(r"Save state_dict\(\) and load it into a new optimizer", lambda: copy.deepcopy(opt), right)


@advice
def from_another_optimizer_the_weights_alone_are_loaded(_: Path) -> Advice:
    model, other = line(), line()
    adam = torch.optim.Adam(model.parameters())
    squares(model)().backward()
    adam.step()

    def right() -> bool:
        other.load_state_dict(model.state_dict())
        return moved(mezo(other), squares(other))

    return Advice(
        "no 'zokern' entry. Coming from another optimizer, load the model's weights alone and begin a new run",
        lambda: mezo(other).load_state_dict(adam.state_dict()),
        right,
    )


@advice
def options_of_a_state_agree(_: Path) -> Advice:
    model = line()
    state = mezo(model, update="adam", betas=(0.5, 0.6)).state_dict()

    def load(**options: Any) -> None:
        mezo(model, update="adam", **options).load_state_dict(state)

    return Advice("betas is .* make them agree", load, lambda: load(betas=(0.5, 0.6)))


def _of_a_run(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = line()
    opt = mezo(model, **options)
    opt.step(squares(model))
    return model, opt.state_dict()


@advice
def other_options_begin_a_new_run_from_the_weights(_: Path) -> Advice:
    model, state = _of_a_run()
    return Advice(
        "num_samples is 1 in state_dict and 4 here; make them agree, or load the model's weights alone and begin a new run",
        lambda: mezo(model, num_samples=4).load_state_dict(state),
        lambda: moved(mezo(model, num_samples=4), squares(model)),
    )


@advice
def another_method_begins_a_new_run_from_the_weights(_: Path) -> Advice:
    model, state = _of_a_run()
    return Advice(
        "state_dict is of MeZO, and this is FZOO; give that method, or load the model's weights alone and begin a new run",
        lambda: zokern.FZOO(model, lr=1e-3).load_state_dict(state),
        lambda: moved(zokern.FZOO(model, lr=1e-3), squares(model)),
    )


@advice
def a_state_is_loaded_by_its_method(_: Path) -> Advice:
    model, state = _of_a_run()

    def right() -> bool:
        opt = mezo(model)
        opt.load_state_dict(state)
        return moved(opt, squares(model))

    return Advice("give that method", lambda: zokern.FZOO(model, lr=1e-3).load_state_dict(state), right)


@advice
def a_journal_that_exists_is_replaced_or_named_anew(path: Path) -> Advice:
    model = line()

    def write(name: str, **options: Any) -> None:
        with zokern.journal.write(mezo(model), path / name, **options):
            pass

    write("a")

    def right() -> None:
        write("b")
        write("a", force=True)

    return Advice("give another name, or force=True", lambda: write("a"), right)


@advice
def one_journal_ends_before_another(path: Path) -> Advice:
    model = line()
    opt = mezo(model)

    def wrong() -> None:
        with zokern.journal.write(opt, path / "a"), zokern.journal.write(opt, path / "b"):
            pass

    def right() -> None:
        with zokern.journal.write(opt, path / "c"):
            opt.step(squares(model))

    return Advice("end that one first", wrong, right)


@advice
def a_run_with_states_begins_with_its_journal(path: Path) -> Advice:
    model = line()
    opt = mezo(model, update="adam")
    opt.step(squares(model))

    def write(opt: Any) -> None:
        with zokern.journal.write(opt, path / "a"):
            opt.step(squares(model))

    def right() -> None:
        write(mezo(model, update="adam"))
        again = mezo(model, update="adam")
        with torch.no_grad():  # the other way: taken up from its own journal
            for p, q in zip(model.parameters(), base, strict=True):
                p.copy_(q)
        with zokern.journal.resume(again, path / "a"):
            again.step(squares(model))
        assert again.counters["steps"] == 2

    base = [p.detach().clone() for p in model.parameters()]
    return Advice("start the journal before the first step", lambda: write(opt), right)


@advice
def a_journal_is_replayed_on_its_base(path: Path) -> Advice:
    model = line()
    base = copy.deepcopy(model)
    opt = mezo(model)
    with zokern.journal.write(opt, path / "a"):
        opt.step(squares(model))
    wrong = copy.deepcopy(model)

    def right() -> None:
        zokern.journal.replay(path / "a", base)
        assert torch.equal(base.weight, model.weight)

    return Advice("give its base model", lambda: zokern.journal.replay(path / "a", wrong), right)


@advice
def a_torn_journal_is_replayed_unverified(path: Path) -> Advice:
    model = line()
    base = copy.deepcopy(model)
    opt = mezo(model)
    after: list[Tensor] = []
    with zokern.journal.write(opt, path / "a"):
        for _ in range(3):
            opt.step(squares(model))
            after.append(model.weight.detach().clone())
    whole = (path / "a").read_bytes()
    (path / "a").write_bytes(whole[:-20])

    def right() -> None:
        zokern.journal.replay(path / "a", base, verify=False)
        assert torch.equal(base.weight, after[-1])

    return Advice("replayed with verify=False", lambda: zokern.journal.replay(path / "a", copy.deepcopy(base)), right)


# ------------------------------------------------------------------------------------------------------------ operators


@advice
def one_tensor_is_passed_as_a_list(_: Path) -> Advice:
    t = torch.zeros(8)

    def right() -> bool:
        zokern.add_noise_([t], tensor_ids=[0], seeds=[3], coefs=[1.0])
        return bool(t.any())

    return Advice(r"pass \[t\]", lambda: zokern.add_noise_(t, tensor_ids=[0], seeds=[3], coefs=[1.0]), right)


@advice
def stochastic_rounding_has_a_seed(_: Path) -> Advice:
    t = torch.zeros(8, dtype=torch.bfloat16)
    return Advice(
        "needs a seed of its own",
        lambda: zokern.add_noise_([t], tensor_ids=[0], seeds=[3], coefs=[1.0], rounding="stochastic"),
        lambda: zokern.add_noise_([t], tensor_ids=[0], seeds=[3], coefs=[1.0], rounding="stochastic", rounding_seed=4),
    )


@advice
def tensors_that_share_memory_are_passed_once(_: Path) -> Advice:
    t = torch.zeros(8)
    return Advice(
        "pass each tensor once",
        lambda: zokern.add_noise_([t, t[2:6]], tensor_ids=[0, 1], seeds=[3], coefs=[1.0]),
        lambda: zokern.add_noise_([t], tensor_ids=[0], seeds=[3], coefs=[1.0]),
    )


def test_a_batch_drawn_inside_the_closure_is_what_check_tells() -> None:
    """As the warning of a skipped step says."""
    model, data = torch.nn.Linear(4, 1), torch.randn(100, 4)

    def drawing(scale: float = 1.0) -> torch.Tensor:
        return scale * model(data[torch.randint(100, (8,))]).square().mean()

    opt = zokern.MeZO(model, lr=1e-3, paired_randomness=False)
    with pytest.warns(zokern.ZokernWarning, match=r"drawn outside the closure: zokern\.check says"):
        opt.step(lambda: drawing(float("inf")))
    assert "not the same function twice" in str(zokern.check(opt, drawing))

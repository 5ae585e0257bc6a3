"""pipelined=True: the update writes the next step's first perturbation too. Same bits, fewer elements moved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.methods import METHODS, Case
from tests.models import Net
from tests.pairs import by_backend, each, label, pairs
from zokern.placement import sites

PLACEMENTS = pytest.mark.parametrize("placement", ["shadow", "stream"])


def run(placement, pipelined, case: Case, dtype=torch.bfloat16, steps=5, between=None, num_dropped=0, **options):
    torch.manual_seed(2)
    model = Net().to(dtype).eval()
    tokens, labels = torch.randint(0, 11, (6, 5)), torch.randint(0, 3, (6,))
    made = case.settings | options
    if num_dropped:
        made["layers"] = zokern.RandomBlocks(num_dropped)
    sign = -1.0 if case.climbs else 1.0
    opt = case.cls(model, case.rate, placement=placement, pipelined=pipelined, seed=5, **made)
    losses = []
    for step in range(steps):
        losses.append(opt.step(lambda: sign * nn.functional.cross_entropy(model(tokens).float(), labels)))
        if between is not None:
            between(step, model, opt)
    return model, opt, torch.stack(losses)


def states(opt) -> list[Tensor]:
    return [t for kept in opt.state.values() for t in kept.values() if isinstance(t, Tensor)]


def same(a, b) -> None:
    (model, opt, losses), (model2, opt2, losses2) = a, b
    assert torch.equal(losses, losses2)
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(p, q)
    for s, t in zip(states(opt), states(opt2), strict=True):
        assert torch.equal(s, t)


@pytest.mark.parametrize(("name", "placement", "num_dropped"), pairs(list(METHODS), ["shadow", "stream"], [0, 2]))
def test_the_bits_are_those_without(name: str, placement: str, num_dropped: int) -> None:
    case = METHODS[name]
    plain = run(placement, False, case, num_dropped=num_dropped)
    piped = run(placement, True, case, num_dropped=num_dropped)
    same(plain, piped)
    assert piped[1].counters["elements_moved"] < plain[1].counters["elements_moved"]


@pytest.mark.parametrize("name", ["mezo", "hizoo"])
@pytest.mark.parametrize("what", ["weight", "state"])
@PLACEMENTS
def test_a_tensor_that_is_another_one_is_seen_though_torch_counts_nothing(placement: str, what: str, name: str) -> None:
    def between(step: int, model: nn.Module, opt) -> None:
        if step == 2:
            with torch.no_grad():
                for p in model.parameters():
                    old = p.data if what == "weight" else opt.state.get(p, {}).get("h")
                    kept.append(old)  # so that the new one lies elsewhere
                    if what == "weight":
                        p.data = 2 * old
                    elif old is not None:
                        opt.state[p]["h"] = 4 * old

    kept: list[object] = []
    plain, piped = (run(placement, pipelined, METHODS[name], between=between) for pipelined in (False, True))
    same(plain, piped)


@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    by_backend([torch.float32, torch.float16, torch.bfloat16], ["mezo", "hizoo", "helene"], slow=each),
    indirect=["backend"],
    ids=label,
)
def test_every_backend_and_dtype(backend: str, device: torch.device, dtype: torch.dtype, name: str) -> None:
    if device.type != "cpu":
        pytest.skip("the oracle's forwards are the CPU's; test_gpu_steps.py has these on a GPU")
    same(
        run("shadow", False, METHODS[name], dtype, steps=3, backend="cpu"),
        run("shadow", True, METHODS[name], dtype, steps=3, backend=backend),
    )


def sizes(model: Net) -> tuple[int, int, int]:
    """Elements in all, in one block, outside the blocks."""
    total, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.layers[0]))
    return total, block, total - len(model.layers) * block


@PLACEMENTS
def test_elements_moved_and_passes(placement: str) -> None:
    case, steps = METHODS["mezo-one-sided-3"], 4
    model, opt, _ = run(placement, True, case, steps=steps)
    total, block, outside = sizes(model)
    shared = total if placement == "shadow" else block + outside
    # A step perturbs 3 times and updates, 2 for each element; what is shared is written with the update, and not read.
    assert opt.counters["elements_moved"] == steps * (4 * 2 * total + shared) - (steps - 1) * 2 * shared
    assert opt.counters["passes"] == (4 * steps - (steps - 1) if placement == "shadow" else 4 * steps)


def test_mezo_takes_two_passes_a_step() -> None:
    opt = run("shadow", True, METHODS["mezo-adam"], steps=6)[1]
    assert opt.counters["passes"] == 2 * 6 + 1


@PLACEMENTS
@pytest.mark.parametrize("what", ["weights", "loaded", "eps", "curvature", "frozen", "group", "evaluated"])
def test_what_happens_between_two_steps(placement: str, what: str) -> None:
    def between(step: int, model: Net, opt: torch.optim.Optimizer) -> None:
        if step not in (1, 2):
            return
        with torch.no_grad():
            if what == "weights":
                model.head.weight.mul_(0.5)
                model.layers[0][0].bias.add_(1.0)
            elif what == "loaded":
                model.load_state_dict({k: v * 0.75 for k, v in model.state_dict().items()})
            elif what == "eps":
                opt.param_groups[0]["eps"] *= 2
            elif what == "curvature":
                opt.state[model.head.weight]["h"].mul_(3.0)
            elif what == "frozen":
                model.embedding.weight.requires_grad_(step == 2)
            elif what == "group":
                if step == 1:
                    model.extra = nn.Parameter(torch.ones(3))
                    opt.add_param_group({"params": [model.extra], "lr": 1e-3})
            else:
                model(torch.zeros(2, 5, dtype=torch.int64))

    same(*(run(placement, pipelined, METHODS["hizoo"], between=between) for pipelined in (False, True)))


@PLACEMENTS
def test_a_skipped_step(placement: str) -> None:
    """Its update does nothing, and the perturbation written with it is that of the weights as they were."""
    runs = []
    for pipelined in (False, True):
        torch.manual_seed(2)
        model = Net().to(torch.bfloat16)
        start = copy.deepcopy(model.state_dict())
        opt = zokern.HiZOO(model, 0.1, placement=placement, pipelined=pipelined, smoothing=1e-2)
        tokens = torch.randint(0, 11, (6, 5))
        factor = [float("nan")]

        def closure(model=model, tokens=tokens, factor=factor) -> Tensor:
            return model(tokens).float().sum() * factor[0]

        with pytest.warns(zokern.ZokernWarning):
            opt.step(closure)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in start.items())
        factor[0] = 1.0
        losses = [opt.step(closure) for _ in range(3)]
        runs.append((model, opt, torch.stack(losses)))
    same(*runs)


@PLACEMENTS
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_closure_that_fails(placement: str, when: int) -> None:
    """In forward `when` of the second step; the step is then done again."""
    runs = []
    for pipelined in (False, True):
        torch.manual_seed(2)
        model = Net().to(torch.bfloat16)
        opt = zokern.HiZOO(model, 0.1, placement=placement, pipelined=pipelined)
        tokens = torch.randint(0, 11, (6, 5))
        calls = [0]

        def closure(model=model, calls=calls, tokens=tokens) -> Tensor:
            calls[0] += 1
            loss = model(tokens).float().square().mean()
            if calls[0] == 3 + when + 1:
                raise KeyError("on purpose")
            return loss

        opt.step(closure)
        clean = copy.deepcopy(model.state_dict())
        with pytest.raises(KeyError):
            opt.step(closure)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in clean.items())
        runs.append((model, opt, torch.stack([opt.step(closure) for _ in range(3)])))
    same(*runs)


def test_blocks_that_run_in_another_order(monkeypatch) -> None:
    """The first block's scratch is filled with the update, and another block takes it."""
    monkeypatch.setattr(Net, "backwards", True)
    same(*(run("stream", pipelined, METHODS["mezo"]) for pipelined in (False, True)))


def test_saving_and_loading_in_between() -> None:
    case = METHODS["helene"]
    whole = run("shadow", True, case, steps=6)
    model, opt, _ = run("shadow", True, case, steps=3)
    other, fresh, _ = run("shadow", True, case, steps=1)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(opt.state_dict())
    torch.manual_seed(2)
    Net()
    tokens, labels = torch.randint(0, 11, (6, 5)), torch.randint(0, 3, (6,))
    for _ in range(3):
        fresh.step(lambda: nn.functional.cross_entropy(other(tokens).float(), labels))
    for p, q in zip(whole[0].parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_more_seeds_than_a_chain_takes() -> None:
    case = Case("es", {"num_directions": 130}, 130, 131, 0.0, 0.01)
    plain, piped = (run("shadow", pipelined, case, steps=2) for pipelined in (False, True))
    same(plain, piped)
    assert plain[1].counters == piped[1].counters


def test_a_journal_of_a_pipelined_run_replays(tmp_path) -> None:
    from zokern import journal

    torch.manual_seed(2)
    model = Net().to(torch.bfloat16)
    base = copy.deepcopy(model)
    opt = zokern.MeZO(model, 0.05, placement="shadow", pipelined=True)
    tokens = torch.randint(0, 11, (6, 5))
    with journal.write(opt, tmp_path / "run.journal"):
        for _ in range(4):
            opt.step(lambda: model(tokens).float().square().mean())
    journal.replay(tmp_path / "run.journal", base)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"placement": "inplace"}, {"placement": "auto"}])
def test_refused_without_copies(options) -> None:
    with pytest.raises(ValueError, match=r"pipelined=True .*use placement='shadow' or 'stream'"):
        zokern.MeZO(Net(), 0.1, pipelined=True, **options)


def test_refused_for_what_it_cannot_know() -> None:
    with pytest.raises(TypeError, match="pipelined"):
        zokern.MeZO(Net(), 0.1, placement="shadow", pipelined=1)
    opt = zokern.MeZO(Net(), 0.1, placement="shadow", pipelined=True, eps=torch.tensor(1e-3))
    with pytest.raises(TypeError, match="eps of parameter group 0 is a tensor; pipelined=True needs a number"):
        opt.step(lambda: torch.zeros(()))


@PLACEMENTS
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("change", ["none", "tied", "swapped", "wrapped", "replaced", "frozen", "compiled", "lost"])
def test_modules_that_change_between_steps(monkeypatch, placement: str, pipelined: bool, change: str) -> None:
    """What a placement keeps of the module's structure from step to step gives the bits of finding it anew each time."""

    def between(step: int, model: Net, opt: torch.optim.Optimizer) -> None:
        if step != 1:
            return
        layers = model.layers
        if change == "tied":
            model.head.weight2 = layers[1][0].weight
            model.head.register_forward_hook(lambda head, args, out: out + head.weight2.mean())
        elif change == "swapped":
            layers[0], layers[2] = layers[2], layers[0]
        elif change == "wrapped":
            layers[1] = nn.Sequential(layers[1])
        elif change == "replaced":
            fresh = nn.Linear(24, 24).to(layers[3][0].weight.dtype)
            fresh.weight = layers[3][0].weight
            fresh.bias = None
            opt.param_groups[0]["params"] = [p for p in opt.param_groups[0]["params"] if p is not layers[3][0].bias]
            layers[3][0] = fresh
        elif change == "frozen":
            layers[0][0].weight.requires_grad_(False)
        elif change == "lost":
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        elif change == "compiled":
            layers[2].compile(backend="eager")

    def once() -> tuple:
        return run(placement, pipelined, METHODS["hizoo"], between=between)

    errors = {"lost": r"head\.weight is not in the module any more"}
    if placement == "stream":
        errors["compiled"] = r"compiled by torch\.compile"
    if change in errors:
        with pytest.raises((RuntimeError, ValueError), match=errors[change]):
            once()
        return
    kept = once()
    monkeypatch.setattr(sites, "fingerprint", lambda module: object())
    same(kept, once())

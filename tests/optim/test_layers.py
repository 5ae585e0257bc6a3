"""Where the blocks of a model are, which of them a step leaves out, and that it leaves them out in every respect."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests import models
from tests.models import Block, Experts, Toy, seeded
from zokern.contract import reference
from zokern.layers import RandomBlocks, find_blocks

PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow"])


def make(depth: int = 5, dtype: torch.dtype = torch.float32) -> Toy:
    return seeded(lambda: Toy(Experts, tied=False, depth=depth), dtype)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    view = {4: torch.int32, 2: torch.int16}
    return {
        n
        for n, p in before.items()
        if not torch.equal(p.view(view[p.element_size()]), after[n].view(view[p.element_size()]))
    }


def dropped_of(names: set[str], depth: int) -> set[int]:
    """The blocks none of whose parameters are among `names`; a block is changed wholly or not at all."""
    out = set()
    for i in range(depth):
        own = {n for n in names if n.startswith(f"layers.{i}.")}
        assert len(own) in (0, 6)
        if not own:
            out.add(i)
    return out


# --------------------------------------------------------------------------------------------------------- find_blocks


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (models.opt, [f"model.decoder.layers.{i}" for i in range(3)]),
        (models.decoder("Llama", num_key_value_heads=1), [f"model.layers.{i}" for i in range(3)]),
        (models.decoder("Qwen2", num_key_value_heads=1), [f"model.layers.{i}" for i in range(3)]),
        (models.gpt2, [f"transformer.h.{i}" for i in range(3)]),
        (models.encoder("Bert"), [f"bert.encoder.layer.{i}" for i in range(3)]),
        (models.encoder("Roberta"), [f"roberta.encoder.layer.{i}" for i in range(3)]),
        (models.t5, ["encoder.block.0", "encoder.block.1", *(f"decoder.block.{i}" for i in range(3))]),
    ],
    ids=["OPT", "LLaMA", "Qwen2", "GPT-2", "BERT", "RoBERTa", "T5"],
)
def test_blocks_of_real_models(build, names):
    transformers = pytest.importorskip("transformers")
    model = build(transformers)
    found = find_blocks(model)
    assert [name for name, _ in found] == names
    modules = dict(model.named_modules())
    assert all(modules[name] is block for name, block in found)
    # And LeZO moves them: what stays in one step are exactly the parameters of the blocks left out.
    before = values(model)
    losses = iter([1.0, 1.5])
    zokern.LeZO(model, 1e-2, num_dropped=len(names) - 1).step(lambda: next(losses))
    still = set(before) - changed(before, values(model))
    in_blocks = [{n for n in before if n.startswith(name + ".")} for name in names]
    assert sum(block <= still for block in in_blocks) == len(names) - 1
    assert still == set().union(*(block for block in in_blocks if block <= still))


def test_blocks_of_our_own_modules():
    assert [n for n, _ in find_blocks(make(3))] == [f"layers.{i}" for i in range(3)]  # and no experts
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 4), 2, enable_nested_tensor=False)
    assert [n for n, _ in find_blocks(encoder)] == ["layers.0", "layers.1"]
    assert find_blocks(nn.Linear(3, 2)) == []
    assert find_blocks(make(1)) == [] or all("experts" not in n for n, _ in find_blocks(make(1)))
    small = nn.ModuleDict(
        {"adapters": nn.ModuleList([nn.Linear(1, 1) for _ in range(9)]), "layers": nn.ModuleList([Block(), Block()])}
    )
    assert [n for n, _ in find_blocks(small)] == ["layers.0", "layers.1"]


def test_names_of_blocks_can_be_looked_up():
    """Also where the model itself is the list of its blocks."""
    blocks = nn.ModuleList([Block(), Block(), Block()])
    found = find_blocks(blocks)
    assert [n for n, _ in found] == ["0", "1", "2"]
    modules = dict(blocks.named_modules())
    assert all(modules[name] is block for name, block in found)


# -------------------------------------------------------------------------------------------------------- RandomBlocks


def bound(num_dropped: int, depth: int = 5) -> tuple[Toy, zokern.MeZO]:
    model = make(depth)
    return model, zokern.MeZO(model, 1e-3, layers=RandomBlocks(num_dropped), seed=8)


def draws(num_dropped: int, depth: int, seed: int, steps: range) -> list[set[int]]:
    blocks = RandomBlocks(num_dropped)
    blocks.bind(make(depth))
    return [blocks.dropped(seed, t) for t in steps]


@pytest.mark.parametrize("num_dropped", [0, 1, 3, 5])
def test_the_number_of_dropped_blocks_is_exact(num_dropped):
    for drawn in draws(num_dropped, 5, 3, range(50)):
        assert len(drawn) == num_dropped
        assert drawn <= set(range(5))


def test_the_draw_is_a_pure_function_of_seed_and_step():
    one, two = draws(2, 5, 3, range(40)), draws(2, 5, 3, range(40))
    assert one == two
    assert draws(2, 5, 3, range(20, 40)) == one[20:]  # whatever was asked before
    assert draws(2, 5, 4, range(40)) != one
    assert len({frozenset(d) for d in one}) > 5
    torch.manual_seed(5)
    assert draws(2, 5, 3, range(40)) == one


def test_the_draw_is_the_documented_shuffle():
    """The first entries of a Fisher-Yates shuffle by SplitMix64 from the layers' stream: a replay elsewhere needs it."""
    for step, drawn in enumerate(draws(3, 6, 11, range(10))):
        state = reference.derive_seed(11, step, (1 << 32) + 1)
        order = list(range(6))
        for i in range(3):
            j = i + reference.splitmix64(state, i + 1) % (6 - i)
            order[i], order[j] = order[j], order[i]
        assert drawn == set(order[:3])


def test_every_block_and_every_pair_is_dropped_equally_often():
    steps = 2000
    drawn = draws(2, 5, 1, range(steps))
    single = Counter(i for d in drawn for i in d)
    pairs = Counter(frozenset(d) for d in drawn)
    assert len(single) == 5
    assert len(pairs) == 10
    for count in single.values():  # binomial(2000, 2/5)
        assert abs(count - 800) < 4.5 * math.sqrt(2000 * 0.4 * 0.6)
    chi2 = sum((count - 200) ** 2 / 200 for count in pairs.values())
    assert chi2 < 27.9  # 9 degrees of freedom: P = 0.001
    in_a_row = sum(a == b for a, b in itertools.pairwise(drawn))
    assert abs(in_a_row - 200) < 4.5 * math.sqrt(2000 * 0.1 * 0.9)


# -------------------------------------------------------------------------------------------------------------- a step


@PLACEMENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropped_blocks_are_not_touched(placement, dtype):
    """No perturbation, no update, no decay, no memory pass; and everything else is perturbed, decayed and updated."""
    depth, num_dropped = 5, 3
    model = make(depth, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = -0.0  # which 1*w + 0*z would not leave as it is
            p.flatten()[1] = 2.5
    opt = zokern.LeZO(
        model, 0.05, num_dropped=num_dropped, weight_decay=0.9, eps=0.05, num_samples=2, seed=8, placement=placement
    )
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    outside = {n for n in sizes if not n.startswith("layers.")}
    params, ever_active, moved = list(model.parameters()), set(), 0
    for step in range(8):
        before, seen = values(model), []
        numbers = iter([torch.tensor(x, dtype=torch.float64) for x in (2.0, 1.0, 1.5, 1.0)])

        def closure(before=before, seen=seen, numbers=numbers) -> Tensor:
            seen.append(changed(before, values(model)))
            return next(numbers)

        opt.step(closure)
        after = changed(before, values(model))
        dropped = dropped_of(after, depth)
        assert len(dropped) == num_dropped
        assert dropped == RandomBlocks.dropped(opt.layers, 8, step)
        assert outside <= after
        assert len(seen) == 4
        assert all(s == after for s in seen)  # inside each forward the same parameters are perturbed
        moved += 5 * 2 * sum(sizes[n] for n in after)
        assert opt.counters["elements_moved"] == moved
        assert opt.counters["passes"] == 5 * (step + 1)
        ever_active |= set(range(depth)) - dropped
        assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert ever_active == set(range(depth))


@PLACEMENTS
def test_an_active_parameter_moves_as_in_mezo(placement):
    """No re-weighting: given the same losses, what is active gets MeZO's update, with the same ids and seeds."""
    full, part = make(), make()
    before = values(part)
    for model, layers in ((full, None), (part, RandomBlocks(2))):
        numbers = iter([2.0, 1.0])
        zokern.MeZO(model, 1e-2, layers=layers, seed=5, weight_decay=0.1, placement=placement).step(
            lambda numbers=numbers: next(numbers)
        )
    moved = changed(before, values(part))
    assert len(dropped_of(moved, 5)) == 2
    a, b = values(full), values(part)
    assert all(torch.equal(a[n], b[n]) for n in moved)


@PLACEMENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lezo_is_mezo_with_random_blocks(placement, dtype):
    one, two = make(dtype=dtype), make(dtype=dtype)
    a = zokern.LeZO(one, 1e-2, num_dropped=2, num_samples=2, seed=3, placement=placement)
    b = zokern.MeZO(two, 1e-2, layers=RandomBlocks(2), num_samples=2, seed=3, placement=placement)
    start = values(one)
    for _ in range(6):
        assert a.step(one).item() == b.step(two).item()
    assert not changed(values(one), values(two))
    assert changed(start, values(one)) == set(start)
    assert a.counters == b.counters


def test_dropping_nothing_is_mezo():
    one, two = make(), make()
    zokern.LeZO(one, 1e-2, num_dropped=0, seed=3).step(one)
    zokern.MeZO(two, 1e-2, seed=3).step(two)
    assert not changed(values(one), values(two))


def test_dropping_everything_moves_the_rest():
    model = make()
    before = values(model)
    numbers = iter([2.0, 1.0])
    zokern.LeZO(model, 1e-2, num_dropped=5).step(lambda: next(numbers))
    assert changed(before, values(model)) == {"embedding.weight", "norm.weight", "norm.bias", "head.weight"}


def test_continue_finds_the_same_blocks():
    whole, half = make(), make()
    a = zokern.LeZO(whole, 1e-2, num_dropped=3, seed=6)
    for _ in range(6):
        a.step(whole)
    b = zokern.LeZO(half, 1e-2, num_dropped=3, seed=6)
    for _ in range(3):
        b.step(half)
    c = zokern.LeZO(half, 1e-2, num_dropped=3, seed=0)
    c.load_state_dict(b.state_dict())
    for _ in range(3):
        c.step(half)
    assert not changed(values(whole), values(half))


@PLACEMENTS
def test_failures_leave_clean_weights_with_layers_too(placement):
    model = make(dtype=torch.bfloat16 if placement == "shadow" else torch.float32)
    before = values(model)
    opt = zokern.LeZO(model, 1e-2, num_dropped=2, placement=placement)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    after = values(model)
    if placement == "shadow":
        assert not changed(before, after)
    assert all(torch.allclose(before[n], after[n], rtol=1e-6, atol=1e-9) for n in before)


def test_one_draw_may_serve_two_models():
    """RandomBlocks is a setting; two optimizers given the same one must not see each other's blocks."""
    layers = RandomBlocks(4)
    one, two = make(), make()
    a = zokern.MeZO(one, 1e-2, layers=layers, seed=3)
    zokern.MeZO(two, 1e-2, layers=layers, seed=3)
    before = values(one)
    numbers = iter([2.0, 1.0])
    a.step(lambda: next(numbers))
    assert len(dropped_of(changed(before, values(one)), 5)) == 4


# ----------------------------------------------------------------------------------------------------------- bad input


def test_named_blocks():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    before = values(model)
    numbers = iter([2.0, 1.0])
    opt = zokern.MeZO(model, 1e-2, layers=RandomBlocks(1, blocks=["0", "2"]))
    opt.step(lambda: next(numbers))
    moved = changed(before, values(model))
    assert {"1.weight", "1.bias"} <= moved
    assert len(moved) == 4


@pytest.mark.parametrize(
    ("layers", "error", "word"),
    [
        (RandomBlocks(-1), ValueError, "num_dropped"),
        (RandomBlocks(6), ValueError, "num_dropped"),
        (RandomBlocks(0.75), TypeError, "num_dropped"),
        (RandomBlocks(True), TypeError, "num_dropped"),
        (RandomBlocks(1, blocks=["layers.0", "layers.9"]), ValueError, r"layers\.9"),
        (RandomBlocks(2, blocks=["layers.0"]), ValueError, "num_dropped"),
        (RandomBlocks(1, blocks=["layers.0", "layers.0"]), ValueError, r"layers\.0"),
        (RandomBlocks(1, blocks=["layers.0", "layers.0.norm"]), ValueError, r"layers\.0"),
    ],
    ids=str,
)
def test_bad_layers_are_refused_by_name(layers, error, word):
    with pytest.raises(error, match=word):
        zokern.MeZO(make(), 1e-3, layers=layers)


def test_a_model_without_blocks_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"layers.*Linear.*blocks="):
        zokern.LeZO(nn.Linear(3, 2), 1e-3, num_dropped=1)


def test_lezo_needs_a_module_and_a_number():
    with pytest.raises(ValueError, match=r"nn\.Module"):
        zokern.LeZO(make().parameters(), 1e-3, num_dropped=1)
    with pytest.raises(TypeError, match="num_dropped"):
        zokern.LeZO(make(), 1e-3)


@PLACEMENTS
@pytest.mark.parametrize("method", ["MeZO", "HiZOO", "HELENE", "MeZOGV", "FZOO"])
def test_a_pass_moves_the_active_elements_only(placement, method):
    """30 of 40 blocks dropped: every pass of the step reads and writes what is left, whatever the method."""
    model = make(40)
    block = sum(p.numel() for p in model.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - 40 * block
    opt = getattr(zokern, method)(model, 1e-3, layers=RandomBlocks(30), placement=placement)
    for _ in range(2):
        before, after = opt.counters, (opt.step(model), opt.counters)[1]
        passes = after["passes"] - before["passes"]
        assert after["elements_moved"] - before["elements_moved"] == 2 * passes * (10 * block + rest)


def test_shadow_keeps_one_pool_for_changing_blocks():
    """Its size is that of one step's active parameters, and it is not made anew when others become active."""
    model = make(8)
    opt = zokern.LeZO(model, 1e-3, num_dropped=6, placement="shadow")
    opt.step(model)
    (pool,) = opt._placement.pools.values()
    padded = [-(-p.numel() // 8) * 8 for p in model.parameters()]
    blocks = [sum(-(-p.numel() // 8) * 8 for p in layer.parameters()) for layer in model.layers]
    assert pool.numel() == sum(padded) - sum(blocks) + 2 * blocks[0]
    for _ in range(5):
        opt.step(model)
    assert next(iter(opt._placement.pools.values())).data_ptr() == pool.data_ptr()


@PLACEMENTS
def test_a_model_wrapped_by_peft(placement):
    """LoRA: only the adapters move, blocks are found inside the wrapping, and dropped ones keep their adapters."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=17, n_embd=8, n_layer=4, n_head=2, n_positions=16)
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config).eval(), lora).eval()
    tokens = torch.arange(12)[None]
    before = values(model)
    opt = zokern.HiZOO(model, 1e-2, layers=RandomBlocks(3), placement=placement, smoothing=1e-4)
    first = opt.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    assert first.isfinite()
    moved = changed(before, values(model))
    assert len(moved) == 2
    assert all("lora_" in name for name in moved)
    for _ in range(30):
        last = opt.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    assert last < first
    assert all("lora_" in name for name in changed(before, values(model)))

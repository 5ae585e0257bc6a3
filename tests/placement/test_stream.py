"""placement="stream": the bits of copies of everything, and no weight seen unperturbed; its memory, and who gets it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.models import HUGGING_FACE, Toy, seeded, toy
from tests.pairs import label, pairs
from tests.placement.streaming import (
    DTYPES,
    SHOWN,
    SharedModules,
    TwoStacks,
    assert_same_as_shadow,
    compiled_inside,
    compiled_whole,
    perturbed,
    same,
    sequential,
)
from zokern import placement as placements
from zokern.noise import derive_seed
from zokern.placement.inplace import InPlace
from zokern.placement.shadow import Shadow
from zokern.placement.stream import Stream, extra_bytes

# ---------------------------------------------------------------------------------------------- same bits as in shadow


@pytest.mark.parametrize(("dtype", "method", "layers"), pairs(DTYPES, SHOWN, [0, 2]), ids=label)
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


@pytest.mark.parametrize(
    ("model", "dtype", "dropped"),
    pairs(["own", *HUGGING_FACE], [torch.float32, torch.bfloat16], [0, 2]), ids=label,
)  # fmt: skip
def test_every_module_sees_exactly_the_perturbed_weights(model, dtype, dropped):
    """Seen by hooks on all modules before and after they run, and by the loss; dropped blocks are seen as they are."""
    build = Toy if model == "own" else HUGGING_FACE[model]
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
            assert [
                n for n, p in expected.named_parameters() if id(p) not in tied
            ] == []  # each was in a module that ran
            for name, seen in used.items():
                assert all(torch.equal(s, values[name]) for s in seen), name
            return loss

        opt.step(closure)
    assert same(model, clean)


# --------------------------------------------------------------------------------------------------------------- memory


def held(opt: Any) -> int:
    return sum(pool.nbytes for pool in opt._placement.memory())


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
        addresses.add(tuple(p.data_ptr() for p in opt._placement.memory()))
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


@pytest.mark.parametrize(
    ("params", "expected", "word"),
    [
        (toy, InPlace, None),
        (lambda: toy(torch.bfloat16), Stream, r"'stream'.*exact; it takes [\d.]+% more memory than the model alone"),
        (lambda: toy(torch.float16), Stream, r"'stream'.*exact; it takes [\d.]+% more memory than the model alone"),
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
    monkeypatch.setattr(placements, "_announced", set())
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

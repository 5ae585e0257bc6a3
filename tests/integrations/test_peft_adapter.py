"""A fine-tune that was never folded, saved as an adapter of peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests.placement import architectures
from tests.placement.test_forward_architectures import quiet

peft = pytest.importorskip("peft")
assert quiet is not None  # the fixture, for this module too
from zokern.integrations.peft import save_adapter  # noqa: E402


def tuned(
    name: str, steps: int, rank: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any, Any]:
    model, loss = architectures.build(name)
    for p in model.parameters():
        p.requires_grad_(p.dim() == 2)
    given = {"distribution": zokern.LowRank(rank), "placement": "forward", "fold_every": 0, "seed": 3, **options}
    opt = zokern.MeZO(model, 1e-2, eps=1e-3, **given)
    for _ in range(steps):
        opt.step(lambda: loss(model))
    return model, loss, opt


@pytest.mark.parametrize(("name", "steps", "rank"), [
    ("Llama", 3, 2), ("Llama", 40, 1), ("GPT-2", 3, 2), ("GPT-2", 40, 1), ("BERT", 3, 1),
])  # fmt: skip
def test_peft_loads_it_to_the_same_losses(name: str, steps: int, rank: int, tmp_path: Path) -> None:
    model, loss, opt = tuned(name, steps, rank)
    with torch.no_grad():
        before = float(loss(model))
        with opt.folded():
            wanted = float(loss(model))
    assert abs(wanted - before) > 2e-4
    assert save_adapter(opt, tmp_path / "adapter") <= steps * rank
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    base, loss = architectures.build(name)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert float(loss(loaded)) == pytest.approx(wanted, rel=1e-5)
    assert opt.pending == steps


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    for word, error, options, change in (
        ("weight_decay", ValueError, {"weight_decay": 0.1}, None),
        ("fold_every=0", RuntimeError, {"fold_every": 2}, None),
        ("0 of 2 steps wait", RuntimeError, {}, lambda opt: opt.fold()),
    ):  # fmt: skip
        _, _, opt = tuned("Llama", 2, 1, **options)
        if change is not None:
            change(opt)
        with pytest.raises(error, match=word):
            save_adapter(opt, place)
    model = nn.Sequential(nn.Linear(8, 8))
    opt = zokern.MeZO(model, 1e-3, distribution=zokern.LowRank(1), placement="forward", fold_every=0)
    with pytest.raises(RuntimeError, match="has done no step"):
        save_adapter(opt, place)
    opt.step(lambda: model(torch.ones(2, 8)).square().sum())
    with pytest.raises(ValueError, match=r"0.bias was trained, a \(8,\) of Linear"):
        save_adapter(opt, place)
    with pytest.raises(TypeError, match="placement='forward'; got Sequential"):
        save_adapter(model, place)  # type: ignore[arg-type]
    assert not place.exists()

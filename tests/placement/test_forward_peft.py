"""placement="forward" with adapters of peft: the losses of materialised weights, and the updates of "shadow"."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests.placement import architectures
from tests.placement.test_forward_architectures import losses_of, optimizer, quiet

peft = pytest.importorskip("peft")
assert quiet is not None  # the fixture, for this module too

LINEAR = ["q_proj", "v_proj", "down_proj"]
# (configuration, its options, what is a copy because something else than a product or a lookup uses it)
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": LINEAR, "init_lora_weights": False}, ()),
    "lora-embedding": ("LoraConfig", {"r": 4, "target_modules": [*LINEAR, "embed_tokens"], "init_lora_weights": False}, ()),
    "modules-to-save": ("LoraConfig", {"r": 4, "target_modules": LINEAR, "modules_to_save": ["lm_head"]}, ()),
    "rslora": ("LoraConfig", {"r": 4, "target_modules": LINEAR, "use_rslora": True, "init_lora_weights": False}, ()),
    "dora": ("LoraConfig", {"r": 4, "target_modules": LINEAR, "use_dora": True, "init_lora_weights": False}, ()),
    "ia3": ("IA3Config",
            {"target_modules": LINEAR, "feedforward_modules": ["down_proj"], "modules_to_save": ["lm_head"]}, ()),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 3, "total_step": 100, "target_modules": LINEAR},
                ("lora_",)),  # scaled by singular values
    "loha": ("LoHaConfig", {"r": 4, "target_modules": LINEAR, "init_weights": False}, ("hada_",)),
    "lokr": ("LoKrConfig", {"r": 4, "target_modules": LINEAR, "init_weights": False}, ("lokr_",)),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 8, "target_modules": LINEAR}, ("oft_",)),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}, ()),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}, ()),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 16}, ()),
}  # fmt: skip


def adapted(kind: str) -> tuple[nn.Module, Any]:
    name, options, _ = KINDS[kind]
    model, loss = architectures.build("Llama")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        return peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **options)).eval(), loss


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_updates_are_those_of_materialised_weights(kind: str) -> None:
    (model, loss), (shadowed, _) = adapted(kind), adapted(kind)
    with torch.no_grad():
        here = float(loss(model))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    opt, shadow = optimizer(model, "forward", 1), optimizer(shadowed, "shadow", 1)
    for number in range(3):
        mine, theirs = losses_of(opt, model, loss), losses_of(shadow, shadowed, loss)
        for a, b in zip(mine, theirs, strict=True):
            assert abs(float(a) - float(b)) <= 4e-6 * abs(float(b)), (number, float(a), float(b))
        assert max(abs(float(a) - here) for a in mine) > 1e-6 * here  # they are perturbed
    for (name, p), q in zip(model.named_parameters(), shadowed.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert name not in frozen or torch.equal(p, frozen[name]), name
    copied = opt._placement.copied
    assert all(any(part in name for part in KINDS[kind][2]) for name in copied), copied
    assert bool(copied) == bool(KINDS[kind][2])


def test_an_adapter_without_matrices_is_refused() -> None:
    model, _ = architectures.build("Llama")
    small = peft.get_peft_model(
        model, peft.IA3Config(task_type="CAUSAL_LM", target_modules=LINEAR, feedforward_modules=[])
    )
    with pytest.raises(ValueError, match=r"none of the .* tensors to be trained is a matrix"):
        zokern.MeZO(small, 1e-3, distribution="lowrank:1", placement="forward")

"""A fine-tune that was never folded, as a LoRA adapter of peft.

    opt = zokern.MeZO(model, lr, distribution=zokern.LowRank(1), placement="forward", fold_every=0)
    ...                                                         # steps
    zokern.integrations.peft.save_adapter(opt, "adapter")       # peft.PeftModel.from_pretrained(base, "adapter")

What waits is sum_k c_k U_k^T V_k for each matrix W [m, n]: an adapter B A with A = V [K r, n] and B = (c U)^T [m, K r].
Where K r is not below the smaller side, the sum itself is B or A, and the other one the identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zokern.contract.streams import matrices
from zokern.deltas import Delta
from zokern.optim import ZerothOrderOptimizer, frameworks
from zokern.optim.folding import Folding
from zokern.passes.update import seed_tensor
from zokern.placement import sites
from zokern.placement.factors import Factors
from zokern.sweep import Member

REMEDY = "freeze it with requires_grad_(False) before the optimizer is made, or call fold() and save the model whole"
Pair = tuple[Tensor, Tensor]  # A [k, in], B [out, k]
_KINDS = nn.Linear, nn.Embedding


@torch.no_grad()
def save_adapter(optimizer: ZerothOrderOptimizer, directory: str | Path) -> int:
    """Saves what waits as a LoRA adapter; the optimizer and its model stay as they are.

    Args:
        optimizer: with placement="forward" and fold_every=0, without weight decay, whose updates have all waited. Trained
            are weights of nn.Linear, nn.Embedding and GPT-2's Conv1D, and nothing else; its module has no adapter.
        directory: gets adapter_config.json, with the rank of each module, and adapter_model.safetensors, in float32.
            Tied weights are saved once for each module that has them.

    Returns:
        The largest rank.

    Raises:
        TypeError: for what is no optimizer of zokern's.
        RuntimeError: where no step was done, nothing waits, or something was folded before.
        ValueError: for what an adapter cannot hold, by name. Nothing is written then.
    """
    import peft
    from safetensors.torch import save_file

    optimizer = frameworks.bare(optimizer)
    if not isinstance(optimizer, ZerothOrderOptimizer):
        raise TypeError(f"optimizer must be one of zokern's, with placement='forward'; got {type(optimizer).__name__}")
    folding, module = optimizer._folding, optimizer.module
    if module is None or folding is None or folding.every != 0:
        raise RuntimeError(
            f"{type(optimizer).__name__} folds its updates into the weights; for an adapter give it fold_every=0 and "
            "placement='forward' from the first step on"
        )
    folding.settle(optimizer)
    steps = optimizer.counters["steps"]
    if not steps:
        raise RuntimeError("the optimizer has done no step, so there is nothing to save")
    if not folding.steps or folding.steps != steps:
        raise RuntimeError(
            f"the updates of {folding.steps} of {steps} steps wait; an adapter has all, and what was folded is in the "
            "weights already: save the model whole"
        )
    if isinstance(module, peft.PeftModel):
        raise ValueError(
            "the optimizer's module is a PeftModel, whose own adapter is trained: use its save_pretrained, after opt.fold()"
        )
    found = dict(_pairs(module, folding))
    ranks = {name: pair[0].shape[0] for name, (_, pair) in found.items()}
    most = max(ranks.values())
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    config = peft.LoraConfig(
        r=most, lora_alpha=most, rank_pattern=other, alpha_pattern=dict(other), bias="none", inference_mode=True,
        target_modules="|".join(re.escape(name) for name in sorted(ranks)),
        fan_in_fan_out=any(type(owner).__name__ == "Conv1D" for owner, _ in found.values()),
        base_model_name_or_path=getattr(getattr(module, "config", None), "_name_or_path", None),
    )  # fmt: skip
    weights: dict[str, Tensor] = {}
    for name, (owner, pair) in found.items():
        kind, tail = ("lora_embedding_", "") if isinstance(owner, nn.Embedding) else ("lora_", ".weight")
        for letter, t in zip("AB", pair, strict=True):
            weights[f"base_model.model.{name}.{kind}{letter}{tail}"] = t.contiguous().cpu()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(directory))
    return most


def _pairs(module: nn.Module, folding: Folding) -> Iterator[tuple[str, tuple[nn.Module, Pair]]]:
    """Each module with a weight that was trained, by name, and its adapter.

    Raises:
        ValueError: for what is no product or lookup with a matrix.
    """
    placement, members = folding.placement, list(folding.sweep)
    if bool((placement.pending.decay != 1.0).any()):
        raise ValueError("weight_decay scales the weights, which an adapter cannot hold; train with weight_decay=0")
    names = {id(owner): name for name, owner in module.named_modules()}
    homes: dict[int, list[sites.Site]] = {}
    for site in sites.find(module, members, placement.name):
        homes.setdefault(id(site.param), []).append(site)
    for m in members:
        for site in homes[id(m.param)]:
            if not _holds(site) or matrices(m.param.shape, placement.rank) is None:
                raise ValueError(
                    f"{m.name} was trained, a {tuple(m.param.shape)} of {type(site.owner).__name__}, which a LoRA adapter "
                    f"cannot hold; {REMEDY}"
                )
    for m in members:
        left, right = _factors(m, folding)
        for site in homes[id(m.param)]:
            a, b = (left, right) if _is_turned(site.owner) else (right, left)
            yield names[id(site.owner)], (site.owner, (a.clone(), b.t()))


def _is_turned(owner: nn.Module) -> bool:
    """Whether W is [in, out]."""
    return isinstance(owner, nn.Embedding) or type(owner).__name__ == "Conv1D"


def _holds(site: sites.Site) -> bool:
    owner: Any = site.owner
    if isinstance(site.param, Delta):
        return True
    known = type(owner) in _KINDS or type(owner).__name__ == "Conv1D"
    return known and site.name == "weight" and getattr(owner, "max_norm", None) is None


def _factors(m: Member, folding: Folding) -> Pair:
    """left [k, m], right [k, n] of sum left^T right, float32, k at most the smaller side."""
    placement = folding.placement
    pending = placement.pending
    coefs = pending.coefs[m.row].to(torch.float32).to(m.param.device)
    own = m._replace(row=0, param=torch.empty(1, device=m.param.device).expand(m.param.shape))  # its shape counts
    factors = Factors([own], [0], placement.rank, placement.passes.backend, {})
    ((left, right, _),) = factors.of(1, len(pending.seeds))
    factors.fill(seed_tensor(pending.seeds))
    left, right = left * coefs.repeat_interleave(placement.rank)[:, None], right.clone()
    rows, columns = m.param.shape
    if left.shape[0] < min(rows, columns):
        return left, right
    total = left.t() @ right
    if rows <= columns:
        return torch.eye(rows, device=total.device), total
    return total.t(), torch.eye(columns, device=total.device)

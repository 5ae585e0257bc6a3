"""What a run says of its adapter: in the journal, and in a line."""

from __future__ import annotations

from typing import Any

from torch import nn

from zokern.finetune import adapted, adapters
from zokern.finetune.options import Options


def about(model: nn.Module, options: Options) -> dict[str, Any]:
    """For a journal: what makes the adapter again. The modules are those that PEFT has found."""
    if options.adapter is None:
        return {}
    values = adapters.settings(options)
    if "targets" in values:
        values["targets"] = ",".join(sorted(adapted.config_of(model).target_modules))
    return {"adapter": {"kind": options.adapter, **values}}


def said(model: Any, options: Options) -> str:
    """The adapter of a model in a line: its settings, how much is trained, and what besides."""
    config = adapted.config_of(model)
    known = about(model, options).get("adapter", {"kind": config.peft_type.value.lower()})
    parts = [f"{name} {value}" for name, value in known.items() if name != "kind" and value is not None]
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    besides: dict[str, int] = {}
    for name, count in trained:
        if ".modules_to_save." in name:
            where = name.partition(".modules_to_save.")[0].removeprefix("base_model.").removeprefix("model.")
            besides[where] = besides.get(where, 0) + count
    extra = ", ".join(f"{where} ({count:,})" for where, count in besides.items())
    return (
        f"{', '.join([known['kind'], *parts])}: {sum(count for _, count in trained):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} numbers are trained"
        + (f", among them, whole, {extra}" if extra else "")
    )

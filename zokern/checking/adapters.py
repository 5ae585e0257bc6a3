"""What PEFT's layers say of themselves, without importing it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def idle(names: Sequence[str], module: nn.Module | None) -> str:
    """Why the adapter that holds a tensor of these names has no effect, and the remedy; "" if it is none, or has."""
    for name in names if module is not None else ():
        parts = name.split(".")
        for end in range(len(parts) - 2, 0, -1):
            layer, kind, adapter = module.get_submodule(".".join(parts[:end])), parts[end], parts[end + 1]  # type: ignore[union-attr]
            active = getattr(layer, "active_adapters", None)
            if active is None or callable(active) or not hasattr(layer, "base_layer") or kind == "base_layer":
                continue
            if getattr(layer, "disable_adapters", False) is True:
                return "its adapter is disabled (disable_adapter): enable it"
            if getattr(layer, "merged", False) is True:
                return "its adapter is merged into the base weight (merge_adapter): call unmerge_adapter()"
            if adapter not in active:
                return f"another adapter is active ({', '.join(active)}): set_adapter({adapter!r})"
    return ""

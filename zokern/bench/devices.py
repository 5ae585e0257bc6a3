"""--device of the bench commands: auto, cpu, cuda or cuda:N."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch


def find_device(name: str) -> torch.device:
    """The torch.device of --device; refuses one that is not there."""
    import torch  # not for --help

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(
            f"{name!r} is not a device; give auto, cpu, cuda or cuda:N", param_hint="--device"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"zokern has no kernels for {name}; give cpu or cuda", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"{name} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices", param_hint="--device"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

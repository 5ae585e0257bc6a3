"""`python -m zokern`: versions, backends and why one is off, and a self-check of a second or so."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable

import torch

import zokern
from zokern import backends
from zokern.backends import native
from zokern.contract import reference


def versions(packages: Iterable[str] = ("zokern", "torch", "triton", "transformers")) -> dict[str, str]:
    """The installed versions of `packages`, and Python's."""
    out = {"python": platform.python_version()}
    for name in packages:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    return found + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def extension_facts() -> str:
    if native.import_error is not None:
        return native.import_error
    ext = native.extension
    cpu = "CPU " + ", ".join(ext.cpu_instruction_sets())
    if not hasattr(ext, "cuda_run"):
        return f"{cpu}; no CUDA kernels in this build"
    return f"{cpu}; CUDA {ext.cuda_toolkit} for {ext.cuda_architectures}"


def self_check(backend: str, device: torch.device) -> str | None:
    """One pass of every kind against the reference; what went wrong, or None."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for distribution, whole in (("normal", (1014,)), ("rademacher", (1014,)), ("lowrank:2", (39, 26))):
            start = torch.linspace(-2, 2, 1003, dtype=torch.float64).to(dtype)
            results = []
            for name, where in ((backend, device), ("reference", torch.device("cpu"))):
                w = start.clone().to(where)
                zokern.add_noise_(
                    [w],
                    tensor_ids=[7],
                    seeds=[3, 4],
                    coefs=[0.5, -0.25],
                    decay=0.75,
                    distribution=distribution,
                    rounding="stochastic",
                    rounding_seed=5,
                    offsets=[11],
                    shapes=[whole],
                    backend=name,
                )
                results.append(w.cpu())
            if not torch.equal(*results):
                return f"{dtype} {distribution}: {int((results[0] != results[1]).sum())} of 1003 elements differ"
    return None


def main() -> int:
    """Prints the report; 1 if a backend that says it runs gives wrong bits."""
    from rich.console import Console  # here, because benchmarks ask for the versions where rich is not installed
    from rich.table import Table as RichTable

    console = Console()
    table = RichTable(title="zokern", show_header=False)
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("compiled module", extension_facts())
    for name in (backends.ENVIRONMENT, "ZOKERN_CPU_ISA"):
        if name in os.environ:
            table.add_row(f"${name}", os.environ[name])
    console.print(table)

    failed = False
    table = RichTable(
        "device", "backend", "state", title="backends", caption="noise contract zk1: the same bits on all"
    )
    for device in devices():
        label = str(device) if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"
        for name, reason in backends.explain(device).items():
            if reason is None:
                wrong = self_check(name, device)
                failed |= wrong is not None
                reason = "[green]ok: same bits as the reference[/]" if wrong is None else f"[red]WRONG: {wrong}[/]"
            table.add_row(label, name, reason)
    console.print(table)
    checksum = reference.philox(0, 0, 0, 0, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    if not checksum:
        console.print("[red]the reference itself is broken on this machine[/]")
    return int(failed or not checksum)


if __name__ == "__main__":
    sys.exit(main())

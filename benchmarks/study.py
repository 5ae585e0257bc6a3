"""What the studies' command lines share. The standard library alone, until a program has said which device it is for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

INSTEAD = "where the JSON goes instead of benchmarks/results"
DEVICES = (("cuda", "cpu"), "of the backends that are compared")


def parser(about: str | None, output: str | None = INSTEAD, **options: Any) -> Any:
    """A parser with --output and `options`, name=(default, help) each.

    A list takes several values, of a tuple one is chosen (default: the first), False is a switch, a type has no default.
    """
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in options.items():
        flag, kind = f"--{name.replace('_', '-')}", default if isinstance(default, type) else type(default)
        if kind is tuple:
            made.add_argument(flag, choices=default, default=default[0], help=f"{text} (default: %(default)s)")
        elif default is False:
            made.add_argument(flag, action="store_true", help=text)
        elif kind is list:
            made.add_argument(flag, nargs="+", type=type(default[0]), default=default, help=text)
        elif default is kind:
            made.add_argument(flag, type=kind, help=text)
        else:
            made.add_argument(flag, type=kind, default=default, help=f"{text} (default: %(default)s)")
    if output is not None:
        made.add_argument("--output", type=Path, metavar="FILE", help=output)
    return made


def torch_device(name: str) -> Any:
    """The device of a program that compares backends; on a CPU, Triton's kernels are interpreted."""
    if name == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import torch

    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")

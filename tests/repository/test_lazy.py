"""`import zokern` and `zokern --help` load nothing heavy; what is named is found when it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import zokern
from zokern import cli
from zokern.cli import waiting

HEAVY = ("torch", "numpy", "transformers", "matplotlib", "triton")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["journal", "--help"], ["replay", "--help"], ["nothing"]])
def test_the_command_is_quick_to_help(arguments: list[str]) -> None:
    out = python(
        f"import sys\nfrom zokern.cli import app\ntry:\n    app({arguments})\nexcept SystemExit:\n    pass\n"
        f"print('loaded', [name for name in {HEAVY} if name in sys.modules])"
    )
    assert "loaded []" in out
    assert "Usage" in out or arguments == ["nothing"]


def test_names_are_found_in_any_order() -> None:
    """`noise` is the function, whether the module of that name was loaded before or after."""
    out = python(
        "import sys, zokern\n"
        f"assert not any(name in sys.modules for name in {HEAVY})\n"
        "from zokern.noise import noise, derive_seed\n"
        "assert zokern.noise is noise and callable(zokern.noise)\n"
        "import zokern.noise\n"
        "assert zokern.noise is noise\n"
        "from zokern import *\n"
        "print(all(callable(globals()[n]) for n in ('MeZO', 'noise', 'add_noise_', 'GraphedStep')))"
    )
    assert out == "True\n"


def test_operators_are_there_for_graphs_that_were_exported_before() -> None:
    """Where torch is loaded, which loads them; elsewhere with the first use of anything."""
    assert (
        python("import torch, zokern\nprint(torch.ops.zokern.pass_, torch.ops.zokern.pass_out)").count("zokern.pass_")
        == 2
    )
    assert "zokern.pass_" in python("import zokern, torch\nzokern.MeZO\nprint(torch.ops.zokern.pass_)")


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(zokern, name) is not None for name in zokern.__all__)
    assert set(zokern.__all__) <= set(dir(zokern))
    assert zokern.placement.PLACEMENTS  # modules too
    for name in ("Nothing", "nothing", "_nothing", "METHODS"):
        with pytest.raises(AttributeError, match=f"module 'zokern' has no attribute '{name}'"):
            getattr(zokern, name)


@pytest.mark.parametrize(
    ("command", "environment", "spins"),
    [
        ("finetune", {}, waiting.SPINS),
        ("bench", {}, None),
        ("finetune", {"OMP_WAIT_POLICY": "active"}, None),
        ("finetune", {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_threads_spin_briefly_where_the_user_has_not_said(
    command: str, environment: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the module of the command is imported, which loads torch, whose OpenMP reads the environment once."""
    for name in waiting.ASKED_FOR:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen = []

    def load(name: str) -> SimpleNamespace:
        seen.append((name, os.environ.get("GOMP_SPINCOUNT")))
        raise SystemExit

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=load))
    try:
        CliRunner().invoke(cli.app, [command, "--help"])
    finally:
        if "GOMP_SPINCOUNT" not in environment:
            os.environ.pop("GOMP_SPINCOUNT", None)
    assert seen == [(cli.LATE[command], spins)]

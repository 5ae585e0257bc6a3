"""`import zokern` and `zokern --help` load nothing heavy; what is named is found when it is used."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import zokern
from zokern.cli import waiting

HEAVY = ("torch", "numpy", "transformers", "matplotlib", "triton")


def python(code: str, **environment: str | None) -> str:
    given = {**os.environ, **environment}
    kept = {name: value for name, value in given.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=kept)
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


SEEN = """
import os
from zokern.cli import app
try:
    app({})
except SystemExit:
    pass
print("spins", os.environ.get("GOMP_SPINCOUNT"))
"""


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
    command: str, environment: dict[str, str], spins: str | None
) -> None:
    given = {**dict.fromkeys(waiting.ASKED_FOR), **environment}
    assert f"spins {spins}\n" in python(SEEN.format([command, "--help"]), **given)


def test_it_is_said_before_openmp_is_loaded() -> None:
    """Its library reads the environment once, when torch loads it: nothing may have loaded torch by then."""
    out = python(
        "import sys\nfrom zokern import cli\nsaid = cli.spin_briefly\n"
        "cli.spin_briefly = lambda: (print('torch', 'torch' in sys.modules), said())\n"
        "try:\n    cli.app(['finetune', '--help'])\nexcept SystemExit:\n    pass"
    )
    assert out.startswith("torch False\n")

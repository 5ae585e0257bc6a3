"""The wheel of `make wheel`, in an environment of its own that has no compiler: `make test-wheel`, not `make test`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.repository.test_build import CUDA_13_0, architectures, stand_in

ROOT = Path(__file__).parents[2]
MEGABYTES = 25
# What every Linux has, by the policy that auditwheel names in the wheel's tag.
SYSTEM = r"linux-vdso|ld-linux-x86-64|libc\b|libm\b|libdl\b|librt\b|libpthread\b|libgcc_s|libstdc\+\+"
pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = sorted((ROOT / "dist").glob("zokern-*.whl"))
    assert len(found) == 1, f"dist has {len(found)} wheels of zokern; make wheel makes one"
    return found[0]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that runs the new environment's Python; nvcc is not on its PATH, and the checkout not its folder."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    torch = [*os.environ.get("PIP_TORCH", "").split(), os.environ.get("TORCH", "torch")]
    for what in (torch, ["--only-binary", ":all:", str(wheel)]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=True, cwd=folder)
    kept = [str(python.parent), *os.environ["PATH"].split(os.pathsep)]
    path = os.pathsep.join(p for p in kept if not Path(p, "nvcc").exists() and not Path(p, "c++").exists())
    assert shutil.which("nvcc", path=path) is shutil.which("c++", path=path) is None
    hidden = ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "TRITON_INTERPRET", "ZOKERN_BACKEND")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"PATH": path, "COLUMNS": "200"}

    def run(*arguments: str) -> str:
        done = subprocess.run([python, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_size_and_tag(wheel: Path) -> None:
    assert wheel.stat().st_size < MEGABYTES * 1_000_000
    assert re.search(r"-manylinux_2_\d+_x86_64\.whl$", wheel.name)


def test_contents(wheel: Path) -> None:
    """The package as it is in the checkout, the module, the licence: nothing older, nothing else, no libraries."""
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    checkout = {
        str(p.relative_to(ROOT)) for ending in ("py", "pyi", "typed") for p in ROOT.glob(f"zokern/**/*{ending}")
    }
    packed = {name for name in names if name.startswith("zokern/")}
    (module,) = packed - checkout
    assert re.fullmatch(r"zokern/_C\.cpython-\d+-x86_64-linux-gnu\.so", module)
    assert checkout - packed == set()
    assert {"zokern/py.typed", "zokern/_C.pyi"} <= packed
    others = {re.sub(r"^zokern-[^/]+\.dist-info/", "", name) for name in names - packed}
    assert others == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def test_what_the_module_links(installed: Any) -> None:
    module = installed("-c", "import zokern._C; print(zokern._C.__file__)").strip()
    assert "site-packages" in module
    listed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout.splitlines()
    assert any("libc.so" in line for line in listed)
    assert [line for line in listed if not re.search(SYSTEM, line.split()[0]) or "not found" in line] == []


def test_kernels_for_the_default_gpus(installed: Any, tmp_path: Path) -> None:
    names = installed("-c", "import zokern._C as c; print(*vars(c)); print(c.cuda_architectures)").splitlines()
    assert {"cuda_run", "cuda_run_chain", "cuda_normal_checksum"} <= set(names[0].split())
    wanted = architectures(**stand_in(tmp_path, known=CUDA_13_0)).stdout.strip()
    assert names[1] == wanted.replace(";", " ")


def test_the_report_runs(installed: Any) -> None:
    said = installed("-m", "zokern")
    assert re.search(r"compiled module .* CPU .*; CUDA \d+\.\d+ for 80-real", said)
    assert "ok: same bits as the reference" in said
    assert "built without CUDA" not in said


ANSWERS = """
import json, sys, torch, zokern
vectors = json.load(open(sys.argv[1]))["normal"]
for e in vectors:
    z = zokern.noise(len(e["z"]), seed=e["seed"], tensor_id=e["tensor_id"], offset=e["offset"], backend="cpu")
    assert [f"{x & 0xFFFFFFFF:08x}" for x in z.view(torch.int32).tolist()] == e["z"], e
print(len(vectors), torch.__version__)
"""


def test_a_pass_on_the_cpu_has_the_known_bits(installed: Any) -> None:
    count, torch = installed("-c", ANSWERS, str(ROOT / "tests" / "data" / "zk1.json")).split()
    assert int(count) > 3
    if "==" in os.environ.get("TORCH", ""):  # installing the wheel brought no other PyTorch
        assert torch.partition("+")[0] == os.environ["TORCH"].partition("==")[2]

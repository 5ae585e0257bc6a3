"""What a release is made of: one version everywhere, and a source distribution that another machine can build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import zokern

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert newest is not None
    assert cited is not None
    assert newest[1] == cited[1] == zokern.__version__


def test_the_day_of_the_release_is_one() -> None:
    newest = re.search(r"^## \S+ \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == ("unreleased" if cited is None else cited[1])


def test_the_source_distribution_has_what_a_build_needs_and_no_more(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = tmp_path.glob("zokern-*.tar.gz")
    with tarfile.open(made) as file:
        packed = {name.partition("/")[2] for name in file.getnames() if file.getmember(name).isfile()}
    needed = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    needed |= {
        str(path.relative_to(ROOT)) for ending in ("py", "pyi", "typed") for path in ROOT.glob(f"zokern/**/*{ending}")
    }
    needed |= {"CMakeLists.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    made_there = {
        name for name in packed if re.search(r"^(PKG-INFO|setup\.cfg|MANIFEST\.in|zokern\.egg-info/.*)$", name)
    }
    assert len(needed) > 300
    assert packed - made_there == needed


def test_a_checkout_is_imported_from_the_folder_above(tmp_path: Path) -> None:
    """There Python sees the checkout's own folder, and would take it for a package without anything in it."""
    (tmp_path / "zokern" / "zokern").mkdir(parents=True)
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import zokern; print(zokern.MeZO.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=plain, capture_output=True, text=True, check=False
    )
    assert done.stdout == "MeZO\n", done.stderr

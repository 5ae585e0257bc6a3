"""`make arm`: what it asks for, what it makes of a folder, how it calls the compiler and the tests, and what the page says.

The emulation itself is make arm's: it takes twenty minutes, a network and Debian's packages.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import benchmarks.arm.page
import benchmarks.arm.run
import benchmarks.parts
from tests.arm import __main__ as arm
from tests.arm import machine as machines
from tests.outside import Failed

Calls = list[tuple[list[str], dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """The commands that a Machine asks for, which put into a folder what their programs would."""
    seen: Calls = []

    def run(command: list[Any], log: Path, **options: Any) -> str:
        words = [*map(str, command)]
        seen.append((words, options))
        if words[0] == "mmdebstrap":
            (Path(words[-1]) / "usr" / "bin").mkdir(parents=True)
            for name in ("python3", "python3.13", "python3.13-config"):
                (Path(words[-1]) / "usr" / "bin" / name).touch()
        if words[:2] == ["uv", "venv"]:
            Path(words[-1]).mkdir()
        if words[:2] == ["uv", "build"]:
            (tmp_path / "zokern-1-cp313-cp313-linux_aarch64.whl").touch()
        return "qemu-aarch64 version 10.0.13 (Debian)\nmore" if words[-1] == "--version" else ""

    monkeypatch.setattr(machines, "run", run)
    return seen


def test_what_is_lacking_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "here")
    assert machines.missing() is None
    monkeypatch.setattr("shutil.which", lambda name: None if name in ("mmdebstrap", "ninja") else "here")
    assert machines.missing() == (
        "mmdebstrap, ninja not on PATH: apt install mmdebstrap; pip install uv build cmake ninja, or `make arm`, which does"
    )
    monkeypatch.setattr("sys.argv", ["tests.arm"])
    with pytest.raises(SystemExit, match="mmdebstrap, ninja not on PATH"):
        arm.main()


def test_a_machine_is_made_once_and_a_half_made_part_anew(calls: Calls, tmp_path: Path) -> None:
    one = machines.Machine(tmp_path / "arm", tmp_path / "log")
    (one.root / "of a call that was broken off").mkdir(parents=True)
    one.make()
    assert [words[0] for words, _ in calls] == ["mmdebstrap", "mmdebstrap", "uv", "uv"]
    assert not (one.root / "of a call that was broken off").exists()
    assert machines.TORCH in calls[-1][0]
    assert "--architectures=arm64" in calls[0][0]
    script = (one.root / "usr" / "bin" / "emulated").read_text()
    assert script.splitlines()[1] == (
        f'exec "${{ZOKERN_QEMU:-{one.emulator}}}" -L {one.root} -0 "$0" {one.root}/usr/bin/python3.13 "$@"'
    ), "Python is found by its version, and is called by the name that the caller used"
    one.make()
    assert len(calls) == 4


def test_a_part_that_fails_is_not_taken_for_made(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = machines.Machine(tmp_path / "arm", tmp_path / "log")
    works: Callable[..., str] = machines.run

    def fails(command: list[Any], log: Path, **options: Any) -> str:
        works(command, log, **options)
        raise Failed("mmdebstrap ended with exit code 1")

    monkeypatch.setattr(machines, "run", fails)
    with pytest.raises(Failed):
        one.make()
    monkeypatch.setattr(machines, "run", works)
    one.make()
    assert [words[0] for words, _ in calls] == ["mmdebstrap", "mmdebstrap", "mmdebstrap", "uv", "uv"]


def test_a_wheel_is_compiled_for_arm_by_this_machines_compiler(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", "the checkout")
    one = machines.Machine(tmp_path / "arm", tmp_path / "log")
    one.make()
    assert one.wheel(tmp_path / "zokern-1.tar.gz", tmp_path).name == "zokern-1-cp313-cp313-linux_aarch64.whl"
    env = calls[-1][1]["env"]
    assert {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH"}.isdisjoint(env)
    assert (env["QEMU_CPU"], env["ZOKERN_CUDA"]) == ("neoverse-n1", "off")
    described = Path(env["CMAKE_TOOLCHAIN_FILE"]).read_text()
    assert "set(CMAKE_SYSTEM_PROCESSOR aarch64)" in described
    assert f"set(CMAKE_CXX_COMPILER {machines.COMPILER})" in described
    assert env["CXX"] == str(one.compiler)
    assert one.version() == "10.0.13"
    shown = one.compiler.read_text().replace(f"exec {machines.COMPILER}", "printf '<%s>'")
    one.compiler.write_text(shown)
    said = subprocess.run([one.compiler, "-O3", "-march=native", "a b.cpp"], capture_output=True, text=True, check=True)
    assert said.stdout == f"<-idirafter><{one.root}/usr/include><-O3><a b.cpp>"
    assert one.variables("max")["QEMU_CPU"] == "max"


def test_the_page_tells_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.parts, "RESULTS", tmp_path)
    cell = {
        "versions": {"python": "3.13.5", "torch": "2.10.0", "numpy": "2.5.5"}, "passed": 2000, "skipped": 3,
        "failed": [], "seconds": 9, "emulator": "10.0.13", "zokern": "0.2.1", "commit": "d4c2ef90aa0966",
    }  # fmt: skip
    cells = {
        "neoverse-n1": cell,
        "max": {**cell, "failed": ["tests/one::c"]},
        "a64fx": {**cell, "broke": "no wheel\nx"},
    }
    record = {
        "results": cells,
        "complete": True,
        "date": "2026-11-30T10:00:00+00:00",
        "settings": {"tests": ["tests/net"]},
    }
    (tmp_path / "arm.json").write_text(json.dumps(record))
    lines = [re.split(r" *\| *", line.strip("| ")) for line in benchmarks.arm.page.tests().splitlines()[2:]]
    assert [line[0] for line in lines] == ["neoverse-n1", "max", "a64fx"]
    assert [line[-1] for line in lines] == ["2,000 passed", "2,000 passed, 1 failed", "no wheel"]
    assert "tests/net" in benchmarks.arm.page.made()
    assert "Not all" not in benchmarks.arm.page.made()
    (tmp_path / "arm.json").write_text(json.dumps({**record, "complete": False}))
    assert "**Not all of it has run.**" in benchmarks.arm.page.made()


@pytest.mark.parametrize(
    ("emulator", "told"), [("no-such-qemu", "apt install qemu-user"), ("sh", "make arm makes one")]
)
def test_the_counter_says_what_it_lacks(
    emulator: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--folder", str(tmp_path), "--emulator", emulator])
    with pytest.raises(SystemExit, match="2"):
        benchmarks.arm.run.main()
    assert told in capsys.readouterr().err


def test_every_pass_is_counted_and_told_in_its_place() -> None:
    rows = benchmarks.parts.load("arm-instructions.json")["results"]
    assert [tuple(row.values())[:4] for row in rows] == benchmarks.arm.run.passes()
    lines = [re.split(r" *\| *", line.strip("| ")) for line in benchmarks.arm.page.instructions().splitlines()]
    names, head = [line[0] for line in lines[2:]], lines[0]
    for row in rows:
        line = lines[2 + names.index(f"`{row['rule']}`, {benchmarks.arm.page.CALLED[row['distribution']]}")]
        column = row["dtype"] + (", stochastic" if row["rounding"] == "stochastic" else "")
        assert line[head.index(column)] == f"{row['instructions_per_element']:.1f}"
    assert len(rows) == sum(len(line) - 1 for line in lines[2:]) == 45

"""The suite's runner, driven with sections that sleep, fail and print; and its command line on a machine without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import runner as suite_runner
from benchmarks.gpu import sections as suite_sections
from benchmarks.gpu import suite as gpu_suite
from benchmarks.gpu.runner import Runner, Section, choose
from tests.command_lines import parse

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


untestable = suite_sections.untestable
READ_ONCE = functools.cache(untestable)  # it reads all test files, each time that sections are made


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_sections, "untestable", READ_ONCE)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_runner, "GRACE", (0.5, 0.5))
    monkeypatch.setattr(suite_runner, "RESERVE", 0.0)


def section(name: str, code: str, budget: float = 20, minimum: float = 0.1, **more: Any) -> Section:
    return Section(name, "a fake", lambda seconds: [[PYTHON, "-c", code]], budget, minimum, **more)


def run(
    tmp_path: Path, *sections: Section, deadline: float = 60, copy_to: Path | None = None
) -> tuple[int, dict[str, Any], str]:
    said: list[str] = []
    out = tmp_path / "out"
    code = Runner(out, deadline, {"machine": "fake"}, said.append, copy_to).run(sections)
    return code, json.loads((out / "summary.json").read_text()), "\n".join(said)


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not collected (a zombie) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def test_passes_logs_and_packs(tmp_path: Path) -> None:
    env = {"SUITE_WORD": "hello"}
    code, summary, said = run(tmp_path, section("a", "import os; print(os.environ['SUITE_WORD'])", env=env),
                              section("b", "print('bye')", note=lambda: "7 of 7"))  # fmt: skip
    assert code == 0
    assert summary["machine"] == "fake"
    assert not summary["interrupted"]
    assert [(s["name"], s["status"], s["why"]) for s in summary["sections"]] == [
        ("a", "passed", ""), ("b", "passed", "7 of 7")
    ]  # fmt: skip
    assert "hello\n" in (tmp_path / "out" / "logs" / "a.log").read_text()
    with tarfile.open(tmp_path / "out" / "suite.tar.gz") as tar:
        assert {"summary.json", "logs", "logs/a.log", "logs/b.log"} == set(tar.getnames())
    last = said.splitlines()[-3:]
    assert [line.split()[0] for line in last] == ["section", "a", "b"]


def test_a_failure_is_told_and_the_rest_runs(tmp_path: Path) -> None:
    code, summary, said = run(tmp_path, section("bad", "print('why it broke'); raise SystemExit(7)"),
                              section("killed", "import os; os.kill(os.getpid(), 9)"),
                              section("good", ""))  # fmt: skip
    assert code == 1
    assert [(s["status"], s["why"]) for s in summary["sections"]] == [
        ("failed", "exit code 7"), ("failed", "ended by SIGKILL"), ("passed", "")
    ]  # fmt: skip
    assert "  | why it broke" in said


def test_all_commands_of_a_section_run(tmp_path: Path) -> None:
    commands = [[PYTHON, "-c", f"print('number', {i}); raise SystemExit({i})"] for i in (1, 0)]
    _, summary, _ = run(tmp_path, Section("two", "", lambda s: commands, 20))
    assert summary["sections"][0]["status"] == "failed"
    assert "number 0\n" in (tmp_path / "out" / "logs" / "two.log").read_text()


def test_a_program_that_is_not_there_fails_its_section(tmp_path: Path) -> None:
    code, summary, _ = run(tmp_path, Section("gone", "", lambda s: [["/nonexistent/program"]], 20), section("a", ""))
    assert code == 1
    assert "/nonexistent/program" in summary["sections"][0]["why"]
    assert summary["sections"][1]["status"] == "passed"


def refuse(*_: Any) -> Any:
    raise SyntaxError("no element found: line 1, column 7")


@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({"note": refuse}, "passed", "(note: SyntaxError: no element found: line 1, column 7)"),
        ({"commands": refuse}, "failed", "SyntaxError: no element found: line 1, column 7"),
        ({"reason": refuse}, "skipped", "cannot say whether it runs here: SyntaxError: no element found"),
    ],
)
def test_a_section_that_raises_costs_no_other(
    change: dict[str, Any], status: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the note of a section whose program was stopped in the middle of its XML."""
    sections = [section("a", ""), dataclasses.replace(section("b", ""), **change), section("c", "print('ran')")]
    _, summary, said = run(tmp_path, *sections)
    assert [s["status"] for s in summary["sections"]] == ["passed", status, "passed"]
    assert summary["sections"][1]["why"].startswith(why)
    with tarfile.open(tmp_path / "out" / "suite.tar.gz") as tar:
        assert "logs/c.log" in tar.getnames()
    assert [line.split()[0] for line in said.splitlines()[-3:]] == ["a", "b", "c"]


def test_results_go_to_another_folder_after_each_section(tmp_path: Path) -> None:
    """Two files, however many there are: what a machine gives back that is gone in the middle of the second section."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "other").write_text("of somebody else")
    (tmp_path / "out").mkdir()
    for i in range(20):
        (tmp_path / "out" / f"result-{i}.json").write_text("{}")
    look = f"""
import json, os, tarfile
home = {str(home)!r}
assert sorted(os.listdir(home)) == ["other", "suite.tar.gz", "summary.json"], os.listdir(home)
assert [s["status"] for s in json.load(open(home + "/summary.json"))["sections"]] == ["passed"]
names = tarfile.open(home + "/suite.tar.gz").getnames()
assert "logs/a.log" in names and "result-19.json" in names and "summary.json" in names, names
"""
    code, summary, said = run(tmp_path, section("a", ""), section("b", look), copy_to=home)
    assert code == 0, (tmp_path / "out" / "logs" / "b.log").read_text()
    assert json.loads((home / "summary.json").read_text()) == summary
    assert len(summary["sections"]) == 2
    assert (home / "suite.tar.gz").read_bytes() == (tmp_path / "out" / "suite.tar.gz").read_bytes()
    assert (home / "other").read_text() == "of somebody else"
    with tarfile.open(home / "suite.tar.gz") as tar:
        assert {"logs/a.log", "logs/b.log"} <= set(tar.getnames())
        assert not [name for name in tar.getnames() if "tar.gz" in name or ".tmp" in name]
    assert "suite.tar.gz, 0.0 MB" in said


def test_results_that_cannot_be_stored_cost_no_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "summary.json").write_text("of the section before")

    def full(source: Path, to: Path) -> None:
        to.write_text("hal")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(suite_runner.shutil, "copyfile", full)
    code, summary, said = run(tmp_path, section("a", ""), section("b", ""), copy_to=home)
    assert code == 0
    assert [s["status"] for s in summary["sections"]] == ["passed", "passed"]
    assert "the results could not be stored: [Errno 28] No space left on device" in said
    assert said.splitlines()[-1].split()[:2] == ["b", "passed"]
    assert [path.name for path in home.iterdir()] == ["summary.json"]
    assert (home / "summary.json").read_text() == "of the section before"


def test_nothing_ran(tmp_path: Path) -> None:
    code, summary, said = run(tmp_path, section("a", "", reason=lambda: "no such thing here"))
    assert code == 3
    assert summary["sections"][0] == {"name": "a", "status": "skipped", "why": "no such thing here", "seconds": 0.0}
    assert "no such thing here" in said


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(60)"])
open({path!r}, "w").write(str(child.pid))
{end}
"""


def test_time_out_ends_children_of_children(tmp_path: Path) -> None:
    """The child ignores SIGINT, and its own child SIGTERM too."""
    path = tmp_path / "pid"
    stubborn = section("stubborn", FAMILY.format(path=str(path), end="time.sleep(60)"), budget=1.5)
    code, summary, _ = run(tmp_path, stubborn, section("next", ""))
    assert code == 1
    assert [s["status"] for s in summary["sections"]] == ["timed out", "passed"]
    wait_for(lambda: not alive(int(path.read_text())), "the grandchild's end")


def test_what_a_passed_section_leaves_running_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    assert run(tmp_path, section("forgets", FAMILY.format(path=str(path), end="")))[0] == 0
    wait_for(lambda: not alive(int(path.read_text())), "the grandchild's end")


def test_a_section_that_is_stopped_can_write_what_it_has(tmp_path: Path) -> None:
    code = f"""
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "partial")!r}, "w").write("half")
"""
    assert run(tmp_path, section("a", code, budget=1.5))[1]["sections"][0]["status"] == "timed out"
    assert (tmp_path / "partial").read_text() == "half"


def test_the_deadline_is_shared_and_leaves_the_minimum_of_what_follows(tmp_path: Path) -> None:
    told: list[float] = []

    def commands(seconds: float) -> list[list[str]]:
        told.append(seconds)
        return [[PYTHON, "-c", ""]]

    sections = [Section(n, "", commands, 600, minimum) for n, minimum in (("a", 1), ("b", 500), ("c", 30))]
    code, summary, _ = run(tmp_path, *sections, deadline=560)
    assert code == 0
    assert told[0] <= 560 - 530  # what b and c need is kept for them
    assert 500 < told[1] <= 560 - 30 < told[2] <= 560
    assert [s["status"] for s in summary["sections"]] == ["passed"] * 3
    told.clear()
    code, summary, _ = run(tmp_path / "2", *sections, deadline=31.5)
    assert [s["status"] for s in summary["sections"]] == ["skipped", "skipped", "passed"]
    assert "it needs 500" in summary["sections"][1]["why"]
    assert len(told) == 1
    told.clear()
    run(tmp_path / "3", Section("d", "", commands, 7), deadline=60)
    assert told == [7]  # its budget, however long the deadline


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C while the second of three sections runs."""
    started = tmp_path / "started"
    pid = os.getpid()

    def interrupt() -> None:
        wait_for(started.exists, "the section")
        os.kill(pid, number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    slow = section("slow", f"import time; open({str(started)!r}, 'w').close(); time.sleep(60)")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    code, summary, _ = run(tmp_path, section("a", ""), slow, section("c", ""))
    thread.join()
    assert code == 130
    assert summary["interrupted"]
    assert [s["status"] for s in summary["sections"]] == ["passed", "interrupted", "skipped"]
    assert (tmp_path / "out" / "suite.tar.gz").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("place", ["note", "reason", "commands"])
def test_an_interruption_is_no_error_of_a_section(place: str, tmp_path: Path) -> None:
    """SIGTERM while the suite itself is at work for one."""
    calls: list[int] = []

    def interrupted(*_: Any) -> Any:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    second = dataclasses.replace(section("b", ""), **{place: interrupted})
    code, summary, _ = run(tmp_path, section("a", ""), second, section("c", ""))
    assert code == 130
    assert len(calls) == 1
    assert summary["interrupted"]
    assert [s["name"] for s in summary["sections"]] == ["a", "b", "c"]
    assert summary["sections"][-1]["why"] == "interrupted before it began"


def test_a_run_that_nobody_listens_to_any_longer_goes_on(tmp_path: Path) -> None:
    """`gpu_suite.sh OUT | head`: the pipe is closed before the first word."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu.runner import Runner, Section
sections = [Section(name, "", lambda s: [[sys.executable, "-c", ""]], 20) for name in "ab"]
sys.exit(Runner(Path({str(tmp_path / "out")!r}), 60, {{}}).run(sections))
"""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([PYTHON, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [s["status"] for s in summary["sections"]] == ["passed", "passed"]
    assert (tmp_path / "out" / "suite.tar.gz").exists()


def test_choice_of_sections() -> None:
    sections = [section(name, "") for name in "abc"]
    assert [s.name for s in choose(sections, [], [])] == ["a", "b", "c"]
    assert [s.name for s in choose(sections, ["c", "a"], ["a"])] == ["c"]
    with pytest.raises(ValueError, match=r"--only has 'd'; the sections are a, b, c"):
        choose(sections, ["d"], [])
    with pytest.raises(ValueError, match=r"--skip has 'x', 'y'"):
        choose(sections, [], ["x", "y"])
    with pytest.raises(ValueError, match="leave no section"):
        choose(sections, ["a"], ["a"])


def suite(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": PYTHON} | more
    command = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.skipif(suite_sections.gpu() is not None, reason="there is a GPU here")
def test_without_a_gpu_every_section_is_skipped(tmp_path: Path) -> None:
    done = suite(str(tmp_path / "new"))
    assert done.returncode == 3, done.stderr
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary["gpu"] is None
    assert {s["why"] for s in summary["sections"]} == {suite_sections.NO_GPU}
    assert [s["name"] for s in summary["sections"]] == [s.name for s in suite_sections.all_sections(tmp_path)]


@pytest.mark.skipif(suite_sections.gpu() is not None, reason="there is a GPU here")
def test_a_part_of_the_suite_and_its_way_home(tmp_path: Path) -> None:
    """A whole call, as on a machine whose GPU is gone, for a folder that takes few files."""
    (tmp_path / "home").mkdir()
    more = ["--part", "truth", "--skip", "checksum", "--copy-to", str(tmp_path / "home")]
    done = suite(str(tmp_path / "new"), *more, ZOKERN_COMMIT="")
    assert done.returncode == 3, done.stderr
    summary = json.loads((tmp_path / "home" / "summary.json").read_text())
    assert [s["name"] for s in summary["sections"]] == ["build", "equality", "tests-gpu", "tests", "sanitizer"]
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["suite.tar.gz", "summary.json"]
    told = suite(str(tmp_path / "told"), "--part", "speed", ZOKERN_COMMIT="0123abc")
    summary = json.loads((tmp_path / "told" / "summary.json").read_text())
    assert summary["commit"] == "0123abc"
    assert "ZOKERN_COMMIT" not in told.stdout
    assert tuple(s["name"] for s in summary["sections"]) == (
        "build", "kernels", "step-1.3b", "step-13b", "compiled", "equality-large"
    )  # fmt: skip


def test_the_list_and_the_help_name_the_parts() -> None:
    listed = suite("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [s.name for s in suite_sections.all_sections(Path("/out"))]
    helped = " ".join(suite("--help").stdout.split())
    for part, names in suite_sections.PARTS.items():
        assert {line.split()[0] for line in listed if part in line[16:33]} == set(names)
        assert f"{part}: {', '.join(names)}" in helped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUTDIR is missing"),
        (["{here}"], "is not an empty folder"),
        (["{here}/new", "--only", "kernel"], "--only has 'kernel'; the sections are build, "),
        (["{here}/new", "--deadline", "0"], "--deadline is 0.0"),
        (["{here}/new", "--part", "rest"], "--part: invalid choice: 'rest'"),
        (["{here}/new", "--part", "truth", "--only", "build"], "not allowed with argument"),
        (["{here}/new", "--copy-to", "{here}/nowhere"], "nowhere is not a folder; make it first"),
        (["{here}/empty", "--copy-to", "{here}/empty"], "--copy-to is OUTDIR"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    done = suite(*(a.format(here=tmp_path) for a in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "new").exists()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_sections, "gpu", lambda: {"name": "a GPU"})
    assert suite_sections.lacks(("torch",)) is None
    reason = suite_sections.lacks(("torch", "no_such_package"), ("no-such-program",))
    assert reason == "this machine lacks the Python package no_such_package, the program no-such-program"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """All that the suite would run on a GPU."""
    monkeypatch.setattr(suite_sections, "gpu", lambda: {"name": "a GPU", "compute_cap": "9.0"})
    return [list(command) for s in suite_sections.all_sections(Path("/out")) for command in s.commands(s.minimum)]


def test_every_script_and_test_file_that_the_sections_name_exists(commands: list[list[str]]) -> None:
    words = [word for command in commands for word in command]
    paths = [Path(word.partition("=")[2] or word) for word in words if str(ROOT) in word]
    assert len(paths) >= 7
    assert all(path.exists() for path in paths if path.name != "zokern" and "build" not in path.parts)
    modules = [words[i + 1] for i, word in enumerate(words) if word == "-m" and words[i - 1] == PYTHON]
    assert len(modules) >= 10
    assert all(importlib.util.find_spec(name) for name in modules)


@pytest.fixture
def python_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this Python one with other tools: pip or none, a setuptools, and a system's own or an environment's."""

    def become(setuptools: str | None, pip: bool = True, managed: bool = False) -> None:
        real_spec, real_version = suite_sections.importlib.util.find_spec, suite_sections.importlib.metadata.version

        def version(name: str) -> str:
            if name == "setuptools" and setuptools is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return setuptools if name == "setuptools" else real_version(name)

        monkeypatch.setattr(suite_sections.importlib.metadata, "version", version)
        monkeypatch.setattr(suite_sections.importlib.util, "find_spec",
                            lambda name: None if name == "pip" and not pip else real_spec(name))  # fmt: skip
        if managed:
            monkeypatch.setattr(suite_sections.sys, "prefix", sys.base_prefix)
            monkeypatch.setattr(suite_sections.Path, "exists", lambda path: path.name == "EXTERNALLY-MANAGED")

    return become


@pytest.mark.parametrize(("having", "why"), [
    ({"setuptools": "75.8.0"}, "setuptools 75.8.0 is older than 77, which pyproject.toml needs"),
    ({"setuptools": None}, "setuptools is missing"),
    ({"setuptools": "81.0.0", "pip": False}, "pip is missing"),
    ({"setuptools": "81.0.0", "managed": True}, "the system forbids pip to install into its Python (PEP 668)"),
])  # fmt: skip
def test_where_pip_cannot_install_cmake_builds(having: dict[str, Any], why: str, python_of: Any) -> None:
    python_of(**having)
    assert suite_sections.build_note() == f"by CMake, not installed: {why}"
    assert [command[0] for command in suite_sections.build("9.0")] == ["cmake", "cmake"]


def test_the_suite_knows_which_setuptools_reads_the_project(python_of: Any) -> None:
    """An older one says of `license` that it is wrong, and nothing of its own age."""
    pins = re.findall(r'"setuptools([<>=][^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert pins == [f">={suite_sections.SETUPTOOLS}"] * 2
    python_of("77.0.1")
    assert suite_sections.build_note() == ""
    assert suite_sections.build("9.0")[0][1:4] == ["-m", "pip", "install"]


def test_cmake_alone_configures_what_setup_py_does(
    tmp_path: Path, python_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really run, without the compilation: an option that CMake does not know would be told as unused."""
    if not all(suite_sections.tool(name) for name in ("nvcc", "cmake", "ninja")):
        pytest.skip("needs nvcc, cmake and ninja")
    python_of("75.8.0")
    configure, _ = suite_sections.build("9.0")
    configure[configure.index("-B") + 1] = str(tmp_path)
    done = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unused = re.findall(r"^    (\w+)$", done.stderr.partition("not used by the project")[2], re.MULTILINE)
    assert set(unused) <= {"Python_EXECUTABLE", "PYTHON_EXECUTABLE"}  # pybind11's name for it has changed
    assert "compute_90" in (tmp_path / "build.ninja").read_text()


def test_sections_fit_the_deadline_and_begin_with_the_build(commands: list[list[str]]) -> None:
    sections = suite_sections.all_sections(Path("/out"))
    assert sections[0].env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert sum(s.minimum for s in sections) + suite_runner.RESERVE < gpu_suite.DEADLINE < 540.1
    for s in sections:
        assert s.minimum <= s.budget
        for seconds in (s.minimum, s.budget):
            for command in map(list, s.commands(seconds)):
                if "--time-limit" in command:  # a benchmark's own limit ends it before the runner does
                    assert float(command[command.index("--time-limit") + 1]) <= seconds - 5


def test_each_part_has_time_for_all_of_its_sections(commands: list[list[str]]) -> None:
    """A build for one architecture takes less than 45 s; what is left of the deadline is enough for every budget."""
    sections = {s.name: s for s in suite_sections.all_sections(Path("/out"))}
    truth, speed = suite_sections.PARTS.values()
    assert set(truth) | set(speed) == set(sections)
    assert set(truth) & set(speed) == {"build"}
    for names in (truth, speed):
        assert list(names) == [name for name in sections if name in names]  # the order in which they run
        budgets = sum(sections[name].budget for name in names if name not in ("build", "sanitizer"))
        last = sections["sanitizer"].minimum if names is truth else 0
        assert 45 + budgets + last + suite_runner.RESERVE <= gpu_suite.DEADLINE
    assert truth[-1] == "sanitizer"  # it takes all that the others leave


def test_every_run_of_pytest_has_workers_and_is_a_section_of_its_own(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process would outlast its section; two runs in one section, and the first takes the second's time."""
    installed = {"xdist", "pytest_timeout"}
    real = suite_sections.importlib.util.find_spec
    monkeypatch.setattr(
        suite_sections.importlib.util, "find_spec",
        lambda n: n in installed or None if n in ("xdist", "pytest_timeout") else real(n),
    )  # fmt: skip
    monkeypatch.setattr(suite_sections.os, "cpu_count", lambda: 16)

    def runs() -> dict[str, list[str]]:
        every = {s.name: [list(c) for c in s.commands(60)] for s in suite_sections.all_sections(Path("/out"))}
        found = {name: of for name, of in every.items() if any("pytest" in command for command in of)}
        assert all(len(of) == 1 for of in found.values())
        return {name: command for name, (command,) in found.items()}

    assert set(runs()) == {"tests-gpu", "tests"}
    shares = {s.name: s.env for s in suite_sections.all_sections(Path("/out")) if s.name in runs()}
    assert shares == {name: {"OMP_NUM_THREADS": "1"} for name in runs()}
    for name, command in runs().items():
        assert command[command.index("-n") + 1] == "16"
        assert command[command.index("-o") + 1] == "faulthandler_timeout=50"
        assert {"--timeout=60", "--timeout-method=thread", f"--junitxml=/out/{name}.xml"} <= set(command)
    assert runs()["tests-gpu"][runs()["tests-gpu"].index("-m", 3) + 1] == "gpu"
    installed.clear()
    for name, command in runs().items():
        assert not {"-n", "--timeout=60"} & set(command)
        assert "in one process, for the lack of pytest-xdist" in suite_sections.tests_note(Path(f"/out/{name}.xml"))


def test_sanitizers_share_their_time_and_look_at_kernels_alone(commands: list[list[str]]) -> None:
    """Each has its share from the start of the program to its end; calls that libraries try out are no errors."""
    watched = [list(command) for command in suite_sections.sanitizer(100)]
    tools = [command[command.index("--tool") + 1] for command in watched]
    assert tools == ["memcheck", "racecheck", "initcheck", "synccheck"]
    for command in watched:
        assert command[command.index("--report-api-errors") + 1] == "no"
        assert command.index("--report-api-errors") < command.index(PYTHON)
        assert 20 <= float(command[command.index("--time-limit") + 1]) <= 100 / 4 - 5
    section = next(s for s in suite_sections.all_sections(Path("/out")) if s.name == "sanitizer")
    assert section.minimum >= 100


def test_benchmark_commands_are_understood_by_the_real_command_line(commands: list[list[str]]) -> None:
    """Parsed by zokern's own CLI, options, types and all, without running; then each value by the command's own checks."""
    pytest.importorskip("typer")
    from zokern.bench import models, options
    from zokern.bench.cases import BENCHMARKS, DTYPES
    from zokern.optim import METHODS

    seen, outputs = [], []
    for command in commands:
        if command[1:3] != ["-m", "zokern"]:
            continue
        name, given = parse(command[3:])
        assert given["device"] == "cuda"
        assert given["time_limit"] >= 10
        seen.append(name)
        outputs.append(given["output"])
        if name == "kernels":
            assert set(given["names"] or []) <= set(BENCHMARKS)
            assert set(given["dtype"] or []) <= set(DTYPES)
        else:
            names = options.choices(given["model"], "--model", models.MODELS)
            assert options.choices(given["methods"], "--methods", METHODS)
            assert options.tokens(given["tokens"], names)
            assert given["output"].parent == Path("/out")
    assert seen == ["kernels", "step", "step", "kernels"]
    assert len(set(outputs)) == len(outputs)  # nothing overwrites another's file


def test_script_commands_have_only_options_that_the_scripts_know(commands: list[list[str]]) -> None:
    scripts = {}
    for command in commands:
        for i, word in enumerate(command):
            if word.startswith("benchmarks.gpu."):
                scripts.setdefault(word, set()).update(w for w in command[i + 1 :] if w.startswith("--"))
    assert set(scripts) == {f"benchmarks.gpu.{name}" for name in ("equality", "checksum", "sanitizer")}
    for name, options in scripts.items():
        command = [PYTHON, "-m", name, "--help"]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "--device" in options
        assert options <= set(re.findall(r"--[a-z-]+", told)), name


def test_missing_packages_leave_the_other_sections(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with torch, numpy and pytest alone; without matplotlib the kernels draw nothing, and say so."""
    real = suite_sections.importlib.util.find_spec
    gone = {"typer", "rich", "transformers", "matplotlib", "hypothesis"}
    monkeypatch.setattr(suite_sections.importlib.util, "find_spec", lambda n: None if n in gone else real(n))
    monkeypatch.setattr(suite_sections, "tool", lambda name: f"/usr/bin/{name}")
    sections = {s.name: s for s in suite_sections.all_sections(Path("/out"))}
    reasons = {name: s.reason() for name, s in sections.items()}
    stopped = {name for name, reason in reasons.items() if reason is not None}
    assert stopped == {"kernels", "compiled", "step-1.3b", "step-13b"}
    assert reasons["kernels"] == "this machine lacks the Python package typer, the Python package rich"
    assert "transformers" in str(reasons["step-13b"])
    (command,) = sections["kernels"].commands(60)
    assert "--no-plot" in command
    assert sections["kernels"].note() == "no pictures, for the lack of matplotlib"
    assert any("--no-plot" in c for c in commands) == (real("matplotlib") is None)


def test_test_files_that_cannot_be_imported_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert untestable() == {}
    ignored = {
        word.partition("=")[2] for word in suite_sections.pytest_run(Path("/out"), "tests", 4) if "--ignore" in word
    }
    assert {Path(path).name for path in ignored} >= {"test_ptx.py", "test_interpreted.py", "test_machine_code.py"}
    real, hidden = suite_sections.importlib.util.find_spec, ("hypothesis", "tests", "zokern", "benchmarks")
    monkeypatch.setattr(suite_sections.importlib.util, "find_spec", lambda n: None if n in hidden else real(n))
    found = {path.name: lacking for path, lacking in untestable().items()}
    assert found["test_properties.py"] == "hypothesis"
    assert set(found.values()) == {"hypothesis"}  # the project's own packages are always there
    assert "test_ops.py" not in found


def test_counts_of_the_tests_are_told(tmp_path: Path) -> None:
    cases = '<testsuite tests="9" failures="1" errors="1" skipped="3"/>'
    (tmp_path / "tests-gpu.xml").write_text(f"<testsuites>{cases}</testsuites>")
    assert suite_sections.tests_note(tmp_path / "tests-gpu.xml").startswith("4 passed, 2 failed, 3 skipped")
    (tmp_path / "tests.xml").write_text(f"<testsuites>{cases[:20]}")
    stopped = section("tests", "", note=lambda: suite_sections.tests_note(tmp_path / "tests.xml"))
    code, summary, _ = run(tmp_path, stopped, section("next", ""))
    assert code == 0
    assert summary["sections"][0]["why"].startswith("(note: ParseError: ")

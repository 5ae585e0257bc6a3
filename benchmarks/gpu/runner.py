"""Runs the sections of a suite one after another under one deadline, and always writes and packs what came of them.

A section is one or more commands. Each gets a process group of its own, so that a time-out or Ctrl-C ends its children
and theirs: first SIGINT, on which our programs write what they have, then SIGTERM, then SIGKILL. Nothing but the standard
library is used, because the suite also runs where little else is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GRACE = (6.0, 2.0)  # seconds after SIGINT, after SIGTERM
RESERVE = 10.0  # seconds of the deadline kept for ending the last section and packing the results
SUMMARY, PACKED = "summary.json", "suite.tar.gz"  # what a run comes down to, however many files it wrote
TAIL = 12  # lines of a failed section's log that are shown
PASSED, FAILED, TIMED_OUT, SKIPPED, INTERRUPTED = "passed", "failed", "timed out", "skipped", "interrupted"

Command = Sequence[str]


@dataclasses.dataclass(frozen=True)
class Section:
    """`commands(seconds)` are run in order, whatever became of those before, and told how long all may take together.
    A function of these that raises costs its own section, no other.

    `reason`: why the section cannot run, None if it can. `budget`, `minimum`: the most seconds that it gets, and the
    fewest that it is started with. `note`: what to say beside the result, asked for when the section is over.
    """

    name: str
    about: str
    commands: Callable[[float], Sequence[Command]]
    budget: float
    minimum: float = 5.0
    reason: Callable[[], str | None] = lambda: None
    note: Callable[[], str] = lambda: ""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    name: str
    status: str
    why: str = ""
    seconds: float = 0.0


def choose(sections: Sequence[Section], only: Sequence[str], skip: Sequence[str]) -> list[Section]:
    """The sections named by `only` (none named: all) less those in `skip`, in their own order; unknown names are errors."""
    names = [section.name for section in sections]
    for option, given in (("--only", only), ("--skip", skip)):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"{option} has {', '.join(map(repr, unknown))}; the sections are {', '.join(names)}")
    chosen = [s for s in sections if (not only or s.name in only) and s.name not in skip]
    if not chosen:
        raise ValueError("--only and --skip leave no section to run")
    return chosen


def say(text: str) -> None:
    """print, at once. Where nobody reads any longer, as behind `| head`, the run goes on in silence: results are files."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # or Python would fail again at its end  # noqa: SIM115


class Interrupted(BaseException):
    """Ctrl-C, or SIGTERM from whatever runs the suite. No handler of a section's errors may take it for one."""


class Runner:
    """Runs sections and writes OUTDIR/summary.json and OUTDIR/suite.tar.gz after each, so that a crash loses nothing.

    copy_to: a folder that gets these two as well, each time: for a machine that only gives back a few files of one folder,
    and may be gone before the run is over.
    """

    def __init__(self, out: Path, deadline: float, facts: Mapping[str, Any], say: Callable[[str], None] = say,
                 copy_to: Path | None = None) -> None:  # fmt: skip
        self.out, self.facts, self.say, self.copy_to = out, dict(facts), say, copy_to
        self.begin = time.monotonic()
        self.end = self.begin + deadline
        self.outcomes: list[Outcome] = []
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, sections: Sequence[Section]) -> int:
        """Runs all; the exit code: 0 if every section that ran passed, 1 if not, 3 if none ran, 130 if interrupted."""
        interrupted = False
        with _signals(_interrupt):
            for i, section in enumerate(sections):
                try:
                    if not interrupted:
                        later = sum(s.minimum for s in sections[i + 1 :] if _reason(s) is None)
                        self._section(section, later)
                        self._store(interrupted)
                except (Interrupted, KeyboardInterrupt):
                    interrupted = True
                finally:
                    if len(self.outcomes) == i:
                        self.outcomes.append(Outcome(section.name, SKIPPED, "interrupted before it began"))
            with _signals(signal.SIG_IGN):
                self._store(interrupted)
        packed = self.out / PACKED
        if packed.exists():
            self.say(f"\neverything is in {packed}, {packed.stat().st_size / 1e6:.1f} MB")
        self.say(self.table())
        if interrupted:
            return 130
        ran = [o for o in self.outcomes if o.status != SKIPPED]
        return 3 if not ran else int(any(o.status != PASSED for o in ran))

    def _section(self, section: Section, later: float) -> None:
        reason = _reason(section)
        left = self.end - RESERVE - time.monotonic()
        seconds = min(section.budget, left - later)
        if reason is None and seconds < section.minimum:
            reason = (
                f"{max(left, 0):.0f} s are left, {later:.0f} of them for what follows; it needs {section.minimum:.0f}"
            )
        if reason is not None:
            self.outcomes.append(Outcome(section.name, SKIPPED, reason))
            self.say(f"{section.name}: skipped: {reason}")
            return
        self.say(f"{section.name}: {section.about} (at most {seconds:.0f} s)")
        begin, log = time.monotonic(), self.out / "logs" / f"{section.name}.log"
        outcome = Outcome(section.name, PASSED)
        self.outcomes.append(outcome)
        try:
            with log.open("w") as file:
                for command in section.commands(seconds):
                    left = begin + seconds - time.monotonic()
                    code = run_group(command, file, left, {**os.environ, **section.env})
                    if code is None:
                        outcome.status = TIMED_OUT
                        break
                    if code != 0 and outcome.status == PASSED:
                        outcome.status, outcome.why = FAILED, _describe(code)
        except (Interrupted, KeyboardInterrupt):
            outcome.status = INTERRUPTED
            raise
        except Exception as error:  # of this section: the others are to run
            outcome.status, outcome.why = FAILED, _told(error)
        finally:
            outcome.seconds = time.monotonic() - begin
            outcome.why = "; ".join(filter(None, [outcome.why, _note(section)]))
            self.say(f"{section.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.why}".rstrip())
            if outcome.status not in (PASSED, INTERRUPTED) and log.exists():
                self.say("".join(f"  | {line}\n" for line in log.read_text(errors="replace").splitlines()[-TAIL:]))

    def table(self) -> str:
        """The last thing that a run prints. Plain text, because a library for tables may be missing there."""
        rows = [("section", "status", "seconds", "")]
        rows += [(o.name, o.status, f"{o.seconds:.0f}" if o.status != SKIPPED else "-", o.why) for o in self.outcomes]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {why}".rstrip() for a, b, c, why in rows]
        return "\n".join(["", *lines])

    def _store(self, interrupted: bool) -> None:
        """The summary, and everything in one file. A full disk must not cost the sections to come, nor the table."""
        summary = {
            **self.facts,
            "seconds": round(time.monotonic() - self.begin, 1),
            "interrupted": interrupted,
            "sections": [dataclasses.asdict(o) | {"seconds": round(o.seconds, 1)} for o in self.outcomes],
        }
        try:
            with _new(self.out / SUMMARY) as temporary:
                temporary.write_text(json.dumps(summary, indent=1) + "\n")
            with _new(self.out / PACKED) as temporary, tarfile.open(temporary, "w:gz") as tar:
                for path in sorted(self.out.iterdir()):
                    if not path.name.startswith(PACKED):
                        tar.add(path, arcname=path.name)
            for name in (SUMMARY, PACKED) if self.copy_to is not None else ():
                with _new(self.copy_to / name) as temporary:
                    shutil.copyfile(self.out / name, temporary)
        except OSError as error:
            self.say(f"the results could not be stored: {error}")


@contextlib.contextmanager
def _new(path: Path) -> Iterator[Path]:
    """A file to write that then takes the place of `path`: whoever looks finds the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _reason(section: Section) -> str | None:
    try:
        return section.reason()
    except Exception as error:
        return f"cannot say whether it runs here: {_told(error)}"


def _note(section: Section) -> str:
    try:
        return section.note()
    except Exception as error:  # a program that was stopped leaves a file cut off
        return f"(note: {_told(error)})"


def run_group(command: Command, log: Any, seconds: float, env: Mapping[str, str]) -> int | None:
    """Runs a command with its output in `log` (a file); its exit code, or None where the time ran out.

    Whatever the command has started and left in its process group is ended too, also when it ended by itself.
    """
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                               start_new_session=True, env=dict(env))  # fmt: skip
    try:
        return process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        log.write(f"\n(stopped: {seconds:.0f} s were over)\n")
        return None
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[Any]) -> None:
    """Ends the process' group, gently where the process itself is still running. A further Ctrl-C does not stop this."""
    with _signals(signal.SIG_IGN):
        for number, grace in zip((signal.SIGINT, signal.SIGTERM), GRACE, strict=True):
            if process.poll() is not None:
                break
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):  # then the next signal
                process.wait(timeout=grace)
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


@contextlib.contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """`timeout` and job managers send SIGTERM: it is to end the suite as cleanly as Ctrl-C does."""
    old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(signal.Signals(number).name)

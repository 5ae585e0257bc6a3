"""The files of a run: options.json, metrics.jsonl and journal.zkj while it runs; checkpoint/, run.json and curves.png at
its end.

Whole files only (replacing.py), in a directory that one process has (locking.py). Earlier results stay until the new ones
are complete (former.py). A directory or a file that somebody takes away while the run goes on is noticed and told, and what
it held is written again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from zokern.finetune import adapter_files, former
from zokern.finetune.failures import telling
from zokern.finetune.locking import Lock
from zokern.finetune.records import Record, line, plain, read
from zokern.finetune.replacing import fresh, replacing, sync, write_whole

Say = Callable[[str], None]
ELSEWHERE = "give another directory"


class Output:
    """The output directory of a run, which `claim` makes. `records` are the lines of metrics.jsonl so far.

    saved: whether the model is. lost: what has been taken away from outside. incomplete: whether that is lost for good.
    """

    def __init__(self, directory: Path, say: Say) -> None:
        self.directory, self._say = directory, say
        self.records: list[Record] = []
        self.start = "zokern"  # the command, as it is started
        self.saved = self.incomplete = self.journaled = False
        self._home = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self.lost: list[str] = []
        self._begun = self._resumed = False
        self._options: dict[str, Any] = {}
        self._metrics: Any = None
        self._journal: BinaryIO | None = None

    # ---------------------------------------------------------------------------------------------------------- beginning

    def begin(self, options: dict[str, Any]) -> None:
        """A new run: earlier results go aside, options.json and an empty metrics.jsonl are written."""
        if former.valuable(self.directory):
            try:
                place = former.put_aside(self.directory)
            except OSError:
                former.settle(self.directory, self._say)  # all is back where it was
                raise
            self._say(f"the results of the earlier run are in {place} until this one is complete")
        else:
            former.remove(self.directory)
        self._begun = True
        self.save_options(options)
        self._metrics = (self.directory / "metrics.jsonl").open("x", encoding="utf-8")

    def look_back(self) -> None:
        """The records of the run that is to go on. A damaged file is kept beside the good lines of it."""
        self._begun = self._resumed = True
        path = self.directory / "metrics.jsonl"
        self.records, wrong = read(path)
        if wrong is not None:
            self._say(f"{path}: {wrong}; the run goes on with the {len(self.records)} lines before")
            if path.exists():
                self._say(
                    f"the damaged file is kept as {self._beside(path, lambda place: shutil.copyfile(path, place))}"
                )

    def go_on(self, records: list[Record], options: dict[str, Any]) -> None:
        """The run goes on with these lines; options.json is written again where it has changed."""
        write_whole(self.directory / "metrics.jsonl", "".join(map(line, records)).encode())
        self.records = list(records)
        self._metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        before = json.loads((self.directory / "options.json").read_text(encoding="utf-8"))
        if before == options:
            self._options = options
        else:
            self.save_options(options)

    def save_options(self, options: dict[str, Any]) -> None:
        """options.json, from which --resume goes on."""
        self._options = options
        self.save_json("options.json", options)

    def watch_journal(self) -> None:
        """From now on there is a journal. It is held open, so that one which is taken away can be written again."""
        self._journal, self.journaled = self.journal.open("rb"), True

    # ---------------------------------------------------------------------------------------------------------------- names

    @property
    def journal(self) -> Path:
        """Where the journal goes."""
        return self.directory / "journal.zkj"

    @property
    def checkpoint(self) -> Path:
        """Where the model and its tokenizer go."""
        return self.directory / "checkpoint"

    @property
    def curves(self) -> Path:
        """Where the plot goes."""
        return self.directory / "curves.png"

    @property
    def resumable(self) -> bool:
        """Whether --resume can go on with what is in the directory."""
        return self.journaled and (self.directory / "options.json").is_file() and self.journal.is_file()

    @property
    def again(self) -> str:
        """The command that goes on."""
        return f"{self.start} finetune --resume --output {shlex.quote(str(self.directory))}"

    # -------------------------------------------------------------------------------------------------------------- writing

    def log(self, record: Record) -> None:
        """Append a line to metrics.jsonl and flush it. A value that is not finite becomes null: JSON has no NaN."""
        self.records.append(plain(record))
        self._metrics.write(line(record))
        self._metrics.flush()

    def save_model(self, model: nn.Module, tokenizer: Any) -> None:
        """checkpoint/, as from_pretrained loads it; PeftModel's, where an adapter was trained."""
        with replacing(self.checkpoint, "directory", "--output", force=True) as new:
            adapter_files.save(model, tokenizer, new)
        self.saved = True

    def save_json(self, name: str, value: dict[str, Any]) -> None:
        """A JSON file in the directory."""
        write_whole(self.directory / name, (json.dumps(value, indent=2) + "\n").encode())

    def save_curves(self, draw: Callable[[Path], None]) -> None:
        """curves.png, drawn by `draw` into the path that it is given."""
        with fresh(self.directory) as work:
            draw(work / "new.png")
            os.replace(work / "new.png", self.curves)

    # -------------------------------------------------------------------------------------------------------- taken away

    def look(self) -> None:
        """Says what has been taken away since the last look. Cheap: three calls of the system."""
        if self._moved_away():
            self._miss(
                f"{self.directory} is no longer the directory in which the run began: removed or renamed; the run goes on, "
                "and its results are written there at the end"
            )
        elif self._metrics is not None and _moved(self.directory / "metrics.jsonl", self._metrics.fileno()):
            self._miss("metrics.jsonl has been removed or replaced; it is written again at the end")
        elif self._journal is not None and _moved(self.journal, self._journal.fileno()):
            self._miss("journal.zkj has been removed or replaced; it is written again at the end")

    def _miss(self, what: str) -> None:
        if what not in self.lost:
            self.lost.append(what)
            self._say(f"warning: {what}")

    def mend(self) -> None:
        """Writes again what has been taken away; the journal is no longer written to."""
        self.look()
        if self._moved_away():
            self.directory = self._place()
            os.close(self._home)
            self._home = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            self._say(f"the results are written to {self.directory}")
            self.save_options(self._options)
        path = self.directory / "metrics.jsonl"
        if _moved(path, self._metrics.fileno()):
            if os.path.lexists(path):  # somebody else's
                self._beside(path, lambda place: os.rename(path, place))
            write_whole(path, "".join(map(line, self.records)).encode())
            self._metrics.close()
            self._metrics = path.open("a", encoding="utf-8")
        if self._journal is not None:
            with self._journal as journal:
                if _moved(self.journal, journal.fileno()):
                    self._mend_journal(journal)
            self._journal = None

    def _moved_away(self) -> bool:
        return _moved(self.directory, self._home)

    def _place(self) -> Path:
        """The directory that the option names, where it is missing or empty; else a new one beside it."""
        if not os.path.lexists(self.directory):
            self.directory.mkdir(parents=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            return self.directory
        number = 1
        while True:
            place = self.directory.with_name(f"{self.directory.name}-{number}")
            with contextlib.suppress(FileExistsError):
                place.mkdir()
                return place
            number += 1

    def _mend_journal(self, journal: BinaryIO) -> None:
        def copy(place: Path) -> None:
            journal.seek(0)
            with place.open("xb") as file:
                shutil.copyfileobj(journal, file)
            sync(place)

        try:
            place = self.journal
            if os.path.lexists(place):
                place = self._beside(place, copy)
            else:
                copy(place)
            self._say(f"the journal has been written again: {place}")
        except OSError as error:
            self.incomplete = True
            self._say(f"error: the journal is lost: {error.strerror}")

    def _beside(self, path: Path, write: Callable[[Path], object]) -> Path:
        """A name of its own for what cannot have `path`."""
        number = 1
        while os.path.lexists(place := path.with_name(f"{path.stem}-{number}{path.suffix}")):
            number += 1
        write(place)
        return place

    # --------------------------------------------------------------------------------------------------------------- ending

    def complete(self) -> None:
        """The new results are there: the earlier ones go."""
        for place in former.asides(self.directory):
            if not former.discard(place):
                self._say(f"{place} has files that no run wrote; they stay")

    def abandon(self) -> bool:
        """A run that failed. Where it has done nothing, all is as it was before: True."""
        if not self._begun:
            return True
        if self._resumed or self._moved_away() or former.valuable(self.directory):
            return False
        try:
            former.remove(self.directory)
            for place in former.asides(self.directory)[-1:]:
                former.put_back(place)
        except OSError as error:
            self._say(
                f"what was in {self.directory} could not be put back ({error.strerror}); the next start tries again"
            )
            return False
        return True

    def close(self) -> None:
        """Close the files."""
        for file in (self._metrics, self._journal):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        os.close(self._home)


def _moved(path: Path, descriptor: int) -> bool:
    """Whether `path` is no longer the open file."""
    try:
        return not os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return True


@contextlib.contextmanager
def claim(directory: Path, *, force: bool, resume: bool, say: Say) -> Iterator[Output]:
    """The output directory for one run: made, looked at and locked before anything is loaded, and let go at the end.

    A directory that this makes is removed again where nothing came to be in it.
    """
    made = [] if resume else _missing(directory)
    with telling(f"--output {str(directory)!r} cannot be used", ELSEWHERE):
        if not resume:
            directory.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(directory)
        except BaseException:
            _remove_empty(made)
            raise
    if lock.unsupported is not None:
        say(f"--output: its file system has no locks ({lock.unsupported}); see to it that no other run writes there")
    output = Output(directory, say)
    try:
        with telling(f"--output {str(directory)!r} cannot be used", ELSEWHERE):
            former.settle(directory, say)
            if resume:
                former.refuse_strangers(directory)
            else:
                former.check(directory, force)
        yield output
    finally:
        output.close()
        lock.release()
        _remove_empty(made)


def _missing(directory: Path) -> list[Path]:
    """The directories that have to be made, the innermost first."""
    found = []
    for path in (directory, *directory.parents):
        if os.path.lexists(path):
            break
        found.append(path)
    return found


def _remove_empty(made: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in made:
            path.rmdir()

"""The journal of a run: a few bytes for each step, from which its weights can be made again, bit for bit.

    with zokern.journal.write(optimizer, "run.zkj"):      # from the first step on
        ... optimizer.step(closure) ...

    zokern.journal.replay("run.zkj", base_model)          # the tuned model, without a forward
    zokern.journal.resume(optimizer, "run.zkj")           # a run that broke off: weights, states, step; it writes on
    zokern.journal.append(optimizer, "run.zkj")           # one that was taken up from a checkpoint; mark(optimizer) fits it
    zokern.journal.flush(optimizer)                       # what a device has not told yet; progress(optimizer) counts it

The format is in format.py and docs/journal.md; what a file may say in checks.py, in which state it can be in reader.py.
"""

from __future__ import annotations

from zokern.hashing import hash_of
from zokern.journal.appending import append
from zokern.journal.format import JournalError
from zokern.journal.reader import Reader
from zokern.journal.recording import Progress, flush, mark, progress
from zokern.journal.replay import replay
from zokern.journal.run import resume, write

__all__ = [
    "JournalError",
    "Progress",
    "Reader",
    "append",
    "flush",
    "hash_of",
    "mark",
    "progress",
    "replay",
    "resume",
    "write",
]

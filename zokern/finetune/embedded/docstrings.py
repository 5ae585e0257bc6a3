"""The default data set of `zokern finetune`: what functions of the Python standard library say that they do.

A text is the first sentence of a public function's docstring, its label the topic of the module it comes from. The
sources are parsed with `ast`, never imported, so nothing runs and nothing is downloaded. Modules that an interpreter
does not have are skipped; the order and the split hang on a hash of the sentence alone, so they are the same on every
machine.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# topic: (the sentence that describes it, the modules and packages it covers)
TOPICS: dict[str, tuple[str, str]] = {
    "concurrency": (
        "Threads, processes, asynchronous tasks, locks and queues.",
        "asyncio concurrent multiprocessing queue sched selectors signal subprocess threading",
    ),
    "formats": (
        "Parsing and writing structured data: XML, JSON, HTML, CSV, configuration files and encodings.",
        "base64 codecs configparser csv encodings html json pickle pickletools plistlib quopri tomllib xml xmlrpc",
    ),
    "files": (
        "Files, directories, paths and compressed archives.",
        (
            "_pyio bz2 compression filecmp fnmatch genericpath glob gzip linecache lzma ntpath os pathlib "
            "posixpath shutil stat tarfile tempfile zipfile zipimport"
        ),
    ),
    "internet": (
        "Internet protocols: mail, web servers and clients, sockets and network addresses.",
        (
            "email ftplib http imaplib ipaddress mailbox nntplib poplib smtplib socket socketserver ssl telnetlib "
            "urllib webbrowser wsgiref"
        ),
    ),
    "numbers": (
        "Numbers, arithmetic, statistics, random values, dates and times.",
        (
            "_pydatetime _pydecimal _strptime bisect calendar colorsys datetime decimal fractions heapq numbers "
            "operator random statistics zoneinfo"
        ),
    ),
    "testing": (
        "Testing, debugging, logging and inspecting the code of a program.",
        (
            "ast bdb dis doctest inspect logging pdb profile pstats pydoc symtable timeit trace traceback "
            "tracemalloc unittest warnings"
        ),
    ),
    "windows": (
        "Windows, widgets, menus, mouse and drawing on the screen.",
        "curses tkinter turtle",
    ),
}

DESCRIPTIONS: dict[str, str] = {topic: sentence for topic, (sentence, _) in TOPICS.items()}
MAX_PER_TOPIC = 300  # keeps the largest topic (tkinter alone has more than 500) from outweighing the smallest
MIN_WORDS = 4  # shorter ones ("Return x.") say nothing about their module
_MIN_SENTENCES = 800  # fewer than this and the held-out accuracy would rest on almost no training text


def _hash(sentence: str) -> str:
    return hashlib.sha256(sentence.encode("utf-8")).hexdigest()


def _first_sentence(docstring: str) -> str:
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()), maxsplit=1)[0]


def _sources(root: Path, module: str) -> Iterator[Path]:
    single = root / f"{module}.py"
    if single.is_file():
        yield single
    for path in sorted((root / module).rglob("*.py")):
        if not {"test", "tests", "site-packages"} & set(path.relative_to(root).parts):
            yield path


def _sentences(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and files of other versions: their absence is not an error
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            sentence = _first_sentence(ast.get_docstring(node) or "")
            if len(sentence.split()) >= MIN_WORDS:
                yield sentence


def sentences(root: Path | None = None) -> list[tuple[str, str]]:
    """All (sentence, topic) pairs, at most MAX_PER_TOPIC a topic, in an order that is a pure function of the sentences.

    root: the standard library's folder; default: that of the running interpreter. A sentence that occurs under two
    topics is left out, as its label would be a coin toss. Raises ValueError where the sources are missing.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    topics: dict[str, set[str]] = {}
    for topic, (_, modules) in TOPICS.items():
        for module in modules.split():
            for path in _sources(root, module):
                for sentence in _sentences(path):
                    topics.setdefault(sentence, set()).add(topic)
    ordered = sorted((_hash(sentence), sentence, min(found)) for sentence, found in topics.items() if len(found) == 1)
    kept: list[tuple[str, str]] = []
    counts = dict.fromkeys(TOPICS, 0)
    for _, sentence, topic in ordered:
        if counts[topic] < MAX_PER_TOPIC:
            counts[topic] += 1
            kept.append((sentence, topic))
    if len(kept) < _MIN_SENTENCES:
        raise ValueError(
            f"only {len(kept)} docstrings found in {root}: this Python carries no sources of its standard library. "
            "Use a full CPython installation, or give your own data with --data FILE"
        )
    return kept

"""What the text of a compiled kernel must not have, whichever cases run it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from . import build

_FUNCTION = re.compile(r"^//-+ \.text\.(\S+)", re.MULTILINE)
_PAIR = re.compile(r"\bLDS R\d+, \[(R\d+)\] ;\s*(?:/\*[^*]*\*/\s*)*(?:@!?U?P\d+ )?LDS R\d+, \[\1\+0x4\]")


def in_ptx(texts: dict[str, str]) -> list[str]:
    """A generic address as one of shared memory: nvcc has taken a pointer for one to what a block stages there, while the
    host says what it points at. The kernels here have no such conversion of their own."""
    found = {name: text.count("cvta.to.shared") for name, text in texts.items()}
    return [f"{name}: {count} addresses are taken for shared memory's" for name, count in found.items() if count]


def in_sass(listing: str) -> list[str]:
    """The same where there is no PTX: a seed's two words come out of shared memory one by one. What a block stages there
    is read in vectors."""
    parts = _FUNCTION.split(listing)[1:]
    texts = zip(parts[::2], parts[1::2], strict=True)
    return [
        f"{build.plain_name(name)}: a seed is read from shared memory" for name, text in texts if _PAIR.search(text)
    ]


def listings(o: build.Object) -> dict[str, str]:
    """The machine code in an object, by architecture."""
    cuobjdump, nvdisasm = build.tool("cuobjdump"), build.tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise build.PtxError("cuobjdump and nvdisasm are neither in Triton's wheel nor on PATH")
    found = {}
    with tempfile.TemporaryDirectory() as there:
        subprocess.run([cuobjdump, "-xelf", "all", str(o.path)], cwd=there, capture_output=True, check=True)
        for cubin in sorted(Path(there).glob("*.cubin")):
            done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
            found[cubin.suffixes[-2].lstrip(".")] = done.stdout
    return found

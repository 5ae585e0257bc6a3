"""What the text of a compiled kernel must not have, whichever cases run it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from . import build

_FUNCTION = re.compile(r"^//-+ \.text\.(\S+)", re.MULTILINE)
_LABEL = re.compile(r"^\.L_x_\d+:", re.MULTILINE)
_SET = re.compile(
    r"\b(?P<op>(?:mul|add|sub|fma)\.rn\.f32x2|mov\.[bu](?:32|64)|mov\.f32)\s+(?P<to>%?\w+|\{[^}]*\})\s*,(?P<of>[^;]*);"
)
_NAME = re.compile(r"%?\b[a-zA-Z_$][\w$]*")
_WORD = re.compile(r"\bLDS R\d+, \[(R\d+)(?:\+(0x[0-9a-f]+))?\]")  # 32 bits


def in_ptx(texts: dict[str, str]) -> list[str]:
    """A generic address as one of shared memory: nvcc has taken a pointer for one to what a block stages there, while the
    host says what it points at. The kernels here have no such conversion of their own.

    A packed sum or difference of a packed product: ptxas before 13.1 makes one operation with one rounding of the two.
    LLVM pairs scalar ones by itself in Triton's kernels."""
    found = {name: text.count("cvta.to.shared") for name, text in texts.items()}
    told = [f"{name}: {count} addresses are taken for shared memory's" for name, count in found.items() if count]
    for name, text in texts.items():
        sums = packed_sums_of_products(text)
        told += [f"{name}: {sums} packed sums of a product, which ptxas may contract"] if sums else []
    return told


def packed_sums_of_products(text: str) -> int:
    """Also where the halves of a product are taken apart and paired anew, as between lines of assembly.

    A register that something else sets too holds a product on one way only, as before a loop over directions. Names of a
    block of assembly (without %) are set anew by each block."""
    statements = [(m["op"], _NAME.findall(m["to"]), _NAME.findall(m["of"])) for m in _SET.finditer(text)]
    others: set[str] = set()  # registers that hold something else, at least on one way
    while True:
        sums, here, products = 0, set[str](), set[str]()
        more = set[str]()
        for op, to, of in statements:
            known = {x for x in of if x in here or (x in products and x not in others)}
            is_product = op.startswith("mul") or (op.startswith("mov") and bool(known))
            sums += op.startswith(("add", "sub")) and bool(known)
            for x in to:
                if not x.startswith("%"):
                    (here.add if is_product else here.discard)(x)
                else:
                    (products if is_product else more).add(x)
        if more <= others:
            return sums
        others |= more


def in_sass(listing: str) -> list[str]:
    """The same where there is no PTX: the two words of a seed come out of shared memory one by one. What a block stages
    there, it reads in vectors."""
    parts = _FUNCTION.split(listing)[1:]
    found = []
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        for block in _LABEL.split(text):
            words = {(register, int(offset or "0", 0)) for register, offset in _WORD.findall(block)}
            if any((register, offset + 4) in words for register, offset in words):
                found.append(f"{build.plain_name(name)}: the words of a seed are read from shared memory")
                break
    return found


def listings(o: build.Object, but: set[str]) -> dict[str, str]:
    """The machine code in an object, by architecture: sm_80 and so on, without some."""
    nvdisasm = build.tool("nvdisasm")
    if nvdisasm is None:
        raise build.PtxError("nvdisasm is neither in Triton's wheel nor on PATH")
    found = {}
    with tempfile.TemporaryDirectory() as there:
        for arch, cubin in build.cubins(o, Path(there)).items():
            if arch not in but:
                done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
                found[arch] = done.stdout
    return found

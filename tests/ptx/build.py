"""What `make setup` left of the CUDA backend: object files, the PTX in them, and a module of them that needs no GPU.

CMake's own files say which objects the module is made of and how each was compiled. Objects that are not there, or older
than their sources, have a reason that names the remedy.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .parse import PtxError, split

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).with_name("shim.cpp")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Object:
    path: Path
    source: Path
    flags: tuple[str, ...]

    @property
    def is_cuda(self) -> bool:
        return self.source.suffix == ".cu"


def folder(root: Path = ROOT) -> Path:
    """As setup.py names it."""
    return root / "build" / f"cmake-{sys.implementation.cache_tag}"


def unavailable_reason(root: Path = ROOT) -> str | None:
    """Why the CUDA backend cannot be emulated, with the remedy; None if it can."""
    ninja = folder(root) / "build.ninja"
    if not ninja.exists():
        return f"there is no {ninja.relative_to(root)}: the kernels are built by `make setup` where nvcc is found"
    made = objects(root)
    if not any(o.is_cuda for o in made):
        return "the module was built without CUDA kernels; ZOKERN_CUDA=on make setup says where it looks for nvcc"
    for o in made:
        name = o.source.relative_to(root)
        if not o.path.exists():
            return f"the object of {name} is not in {folder(root).relative_to(root)}; run make setup"
        built = o.path.stat().st_mtime_ns
        newer = [p.relative_to(root) for p in sources_of(o.source) if p.stat().st_mtime_ns > built]
        if newer:
            return f"the object of {name} is older than {sorted(newer)[0]}; run make setup"
    if tool("cuobjdump") is None:
        return "cuobjdump is neither in Triton's wheel nor on PATH"
    return None


def objects(root: Path = ROOT) -> list[Object]:
    """Those that the module is linked from."""
    text = (folder(root) / "build.ninja").read_text().replace("$\n", "")
    link = re.search(r"^build \S+: CXX_MODULE_LIBRARY_LINKER__\w+ ([^|\n]*)", text, re.MULTILINE)
    if link is None:
        raise PtxError(f"{folder(root)}/build.ninja links no module")
    made = []
    for name in link[1].split():
        rule = re.search(rf"^build {re.escape(name)}: .*\n((?: .*\n)*)", text, re.MULTILINE)
        flags = re.search(r"^ *FLAGS = (.*)$", rule[1], re.MULTILINE) if rule else None
        source = root / re.sub(r"^CMakeFiles/[^/]+\.dir/", "", name).removesuffix(".o")
        made.append(Object(folder(root) / name, source, tuple(shlex.split(flags[1])) if flags else ()))
    return made


@functools.cache
def sources_of(path: Path) -> frozenset[Path]:
    """A source, and what it includes of the project's own."""
    found, left = {path}, [path]
    while left:
        at = left.pop()
        for name in _INCLUDE.findall(at.read_text()):
            included = (at.parent / name).resolve()
            if included.exists() and included not in found:
                found.add(included)
                left.append(included)
    return frozenset(found)


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: out of Triton's wheel, or from PATH."""
    for place in sys.path:
        bundled = Path(place) / "triton" / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    return shutil.which(name)


def compiler(language: str, root: Path = ROOT) -> str:
    """The one that CMake has compiled with."""
    text = (folder(root) / "CMakeCache.txt").read_text()
    m = re.search(rf"^CMAKE_{language}_COMPILER:\w+=(.+)$", text, re.MULTILINE)
    if m is None:
        raise PtxError(f"{folder(root)}/CMakeCache.txt names no compiler of {language}")
    return m[1]


# ----------------------------------------------------------------------------------------------------------------- PTX
def ptx_of(arch: int, root: Path = ROOT) -> dict[str, str]:
    """Every CUDA kernel's PTX by its plain name: from the objects where they carry it, else compiled as they were."""
    texts: dict[str, str] = {}
    for o in objects(root):
        if o.is_cuda:
            text = _ptx_in(o, arch) or _compiled(o, arch, root)
            texts |= {plain_name(name): kernel for name, kernel in split(text).items()}
    return texts


def carried(root: Path = ROOT) -> list[int]:
    """Architectures whose PTX is in the objects."""
    flags = " ".join(flag for o in objects(root) if o.is_cuda for flag in o.flags)
    return sorted({int(n) for n in re.findall(r"code=\[?compute_(\d+)", flags)})


def cubins(o: Object, there: Path) -> dict[str, Path]:
    """The machine code in an object, taken out into a folder, by architecture: sm_80 and so on."""
    subprocess.run([str(tool("cuobjdump")), "-xelf", "all", str(o.path)], cwd=there, capture_output=True, check=True)
    return {cubin.suffixes[-2].lstrip("."): cubin for cubin in sorted(there.glob(f"{o.source.name}*.cubin"))}


def plain_name(kernel: str) -> str:
    """Without the tag of a file's anonymous namespace, which differs from build to build."""
    return re.sub(r"\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}(?:_\d+)?", "", kernel)


def _ptx_in(o: Object, arch: int) -> str | None:
    command = [str(tool("cuobjdump")), "-ptx", str(o.path)]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in dumped.split("Fatbin ptx code:"):
        if re.search(rf"^\.target sm_{arch}\b", part, re.MULTILINE):
            return part
    return None


def _compiled(o: Object, arch: int, root: Path) -> str:
    """The source as of now, kept by the contents of all that it includes."""
    flags = [flag for flag in o.flags if not flag.startswith("--generate-code")]
    nvcc = compiler("CUDA", root)
    digest = hashlib.sha256(f"{nvcc} {flags} {arch}".encode())
    for path in sorted(sources_of(o.source)):
        digest.update(path.read_bytes())
    file = cache.folder() / f"{o.source.name}-{digest.hexdigest()[:24]}-{arch}.ptx"
    if not file.exists():
        with cache.writing(file) as out:
            _run(nvcc, *flags, f"-arch=compute_{arch}", "-ptx", "-o", str(out), str(o.source))
    return file.read_text()


# -------------------------------------------------------------------------------------------------------------- module
def module_without_gpu(root: Path = ROOT) -> Path:
    """zokern._C with shim.cpp in the place of the CUDA runtime, linked once for each build."""
    parts = [o.path for o in objects(root)]
    stamps = "".join(f"{p} {p.stat().st_mtime_ns} {p.stat().st_size}\n" for p in parts)
    tag = hashlib.sha256(stamps.encode() + SHIM.read_bytes()).hexdigest()[:24]
    file = cache.folder() / f"_C-{tag}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not file.exists():
        cxx = compiler("CXX", root)
        with cache.writing(file) as out, tempfile.TemporaryDirectory() as there:
            shim = f"{there}/shim.o"
            _run(cxx, "-O1", "-fPIC", "-c", str(SHIM), "-o", shim)
            _run(cxx, "-shared", "-flto=auto", "-o", str(out), *map(str, parts), shim, "-lpthread")
    return file


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PtxError(f"{shlex.join(command)}: {done.stderr.strip()}")

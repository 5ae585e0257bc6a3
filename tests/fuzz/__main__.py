"""Coverage-guided fuzzing of the journal: reader, show, diff, replay and resume, with the sanitizers' build of the kernels.

    make fuzz                              a million inputs, two processes
    python -m tests.fuzz --runs 20000      fewer
    python -m tests.fuzz --again FILE      an input that was found, once

Needs the packages atheris, cmake and ninja. An input may not crash, hang, take 300 MB more than there
is at the beginning, or end in another exception than JournalError. What does is kept below build/fuzz/.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD, FOUND = ROOT / "build" / "sanitized", ROOT / "build" / "fuzz"
WORKER = "ZOKERN_FUZZ_WORKER"
SECONDS, MORE_MB, MAX_BYTES = 20, 300, 1 << 16


def build() -> Path:
    """The extension with the address and undefined behaviour sanitizers."""
    import pybind11

    options = [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPYTHON_EXECUTABLE={sys.executable}",
        "-DZOKERN_SANITIZE=ON",
    ]
    subprocess.run(
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *options], check=True, stdout=subprocess.DEVNULL
    )
    print("building the kernels with sanitizers, minutes the first time", flush=True)
    subprocess.run(["cmake", "--build", str(BUILD)], check=True)
    (found,) = BUILD.glob("_C*.so")
    return found


def preloaded() -> str:
    """The sanitizers' library with libFuzzer in it has to be there before Python is."""
    found = importlib.util.find_spec("atheris")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parents[1] / "asan_with_fuzzer.so")


def start(extension: Path, arguments: list[str], number: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        WORKER: str(extension),
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.fuzz", *arguments, "--number", str(number)]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def use(extension: Path) -> None:
    """zokern's compiled module is this file."""
    spec = importlib.util.spec_from_file_location("zokern._C", extension)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zokern._C"] = module
    spec.loader.exec_module(module)


def work(args: argparse.Namespace) -> None:
    """One process: inputs until there were as many as asked for."""
    import atheris_no_libfuzzer as atheris
    import torch

    torch.set_num_threads(1)
    use(Path(os.environ[WORKER]))
    importlib.import_module("zokern.optim")  # what is fuzzed is the journal: coverage of that

    with atheris.instrument_imports(include=["zokern.journal", "zokern.cli.journals"]):
        from tests.fuzz import corpus, records, targets

    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path, good = folder / "run.zkj", corpus.stored()["plain"]

    def one(data: bytes) -> None:
        """An input stands for a file, and for what is done with it."""
        rng = random.Random(data)
        what = rng.random()
        if what > 0.1:  # else its checksums are wrong, and the reader's first lines are tried
            data = records.changed(data, rng) if what > 0.6 else records.repaired(data)
        path.write_bytes(data)
        targets.all_of(path, good, targets.NAMES if args.again else [rng.choice(targets.NAMES)])

    if args.again is not None:
        one(args.again.read_bytes())
        print("no fault")
        return

    inputs = FOUND / f"corpus{args.number}"
    inputs.mkdir(parents=True, exist_ok=True)
    for name, stored in corpus.stored().items():
        shutil.copy(stored, inputs / f"stored-{name}")
        path.write_bytes(stored.read_bytes())
        targets.all_of(path, good)  # all that is imported late is there
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    flags = [f"-runs={args.runs}", f"-timeout={SECONDS}", f"-rss_limit_mb={base + MORE_MB}", f"-max_len={MAX_BYTES}",
             f"-artifact_prefix={FOUND}/", f"-seed={args.seed + args.number}", "-print_final_stats=1"]  # fmt: skip
    if args.seconds:
        flags.append(f"-max_total_time={args.seconds}")
    atheris.Setup([sys.argv[0], str(inputs), *flags], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500_000, help="inputs for each process (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=0, help="end after this long; 0: no limit")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30), help="default: a new one")
    parser.add_argument("--again", type=Path, help="an input that was found: run it once")
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if WORKER in os.environ:
        work(args)
        return 0
    extension, jobs = build(), 1 if args.again else args.jobs
    passed = [f"--runs={args.runs}", f"--seconds={args.seconds}", f"--seed={args.seed}"]
    passed += [f"--again={args.again.resolve()}"] if args.again else []
    print(f"{jobs} processes, {args.runs} inputs each, seed {args.seed}", flush=True)
    codes = [process.wait() for process in [start(extension, passed, i) for i in range(jobs)]]
    print(f"exit codes {codes}" + ("" if not any(codes) else f"; what was found is in {FOUND}"))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())

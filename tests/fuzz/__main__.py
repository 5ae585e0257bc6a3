"""Coverage-guided fuzzing of the journal: reader, show, diff, replay and resume, with the sanitizers' build of the kernels.

    make fuzz                              a million inputs, two processes, an hour or two
    python -m tests.fuzz --runs 20000      fewer
    python -m tests.fuzz --seconds 3600    for an hour
    python -m tests.fuzz --again FILE      an input that was found, once, with the lines of a crash
    python -m tests.fuzz.keep              of what was found, what reaches more than the stored ones do, for `make test`

Needs the packages atheris, cmake and ninja. An input may not crash, hang, take 300 MB more than
those before it, or end in another exception than JournalError. What does is kept below build/fuzz/.
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

from tests.fuzz import kept
from tests.fuzz.kept import FOUND

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
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


def preloaded(*, mutates: bool) -> str:
    """The sanitizers' library with libFuzzer in it has to be there before Python is; libFuzzer looks for a mutator when it
    is loaded, so what calls ours has to be there too. Without that, the lines of a crash have names: what finds them is no
    Python, which that needs, and has the same libraries preloaded."""
    mutator = importlib.util.find_spec("atheris.custom_mutator")
    assert mutator is not None
    assert mutator.origin is not None
    sanitizers = str(Path(mutator.origin).parents[1] / "asan_with_fuzzer.so")
    return f"{sanitizers} {mutator.origin}" if mutates else sanitizers


def start(extension: Path, arguments: list[str], number: int, *, mutates: bool) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        WORKER: str(extension),
        "LD_PRELOAD": preloaded(mutates=mutates),
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
    import atheris
    import torch

    torch.set_num_threads(1)
    use(Path(os.environ[WORKER]))
    importlib.import_module("zokern.optim")  # what is fuzzed is the journal: coverage of that

    with atheris.instrument_imports(include=["zokern.journal", "zokern.cli.journals"]):
        from tests.fuzz import corpus, records, targets

    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path, stored = folder / "run.zkj", corpus.stored()
    files = [one.read_bytes() for one in stored.values()]

    def one(data: bytes) -> None:
        """An input is a journal."""
        path.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        targets.all_of(path, stored)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        assert more <= MORE_MB, f"the input took {more} MB more than all before it"

    def another(data: bytes, size: int, seed: int) -> bytes:
        """Of it: what it says changed, most often; or its bytes, then mostly with right checksums."""
        rng = random.Random(seed)
        what = rng.random()
        if what < 0.7:
            return records.changed(data, rng)[:size]
        if what < 0.8:
            return records.spliced(data, rng.choice(files), rng)[:size]
        data = atheris.Mutate(data, size)
        return (records.repaired(data) if what < 0.97 else data)[:size]

    if args.again is not None:
        one(args.again.read_bytes())
        print("no fault")
        return

    inputs = FOUND / f"corpus{args.number}"
    inputs.mkdir(parents=True, exist_ok=True)
    for name, data in kept.stored().items():
        (inputs / name).write_bytes(data)
    for name, file in stored.items():
        shutil.copy(file, inputs / name)
        one(file.read_bytes())  # all that is imported late is there
    flags = [
        f"-runs={args.runs}",
        f"-timeout={SECONDS}",
        f"-max_len={MAX_BYTES}",
        f"-artifact_prefix={FOUND}/",
        f"-seed={args.seed + args.number}",
        "-print_final_stats=1",
        f"-malloc_limit_mb={MORE_MB}",
        "-rss_limit_mb=0",  # of the process, where tables of former inputs are kept; `one` looks at each input's
    ]
    if args.seconds:
        flags.append(f"-max_total_time={args.seconds}")
    atheris.Setup([sys.argv[0], str(inputs), *flags], one, custom_mutator=another)
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
    codes = [process.wait() for process in [start(extension, passed, i, mutates=not args.again) for i in range(jobs)]]
    print(f"exit codes {codes}" + (f"; what was found is in {FOUND}, run it with --again" if any(codes) else ""))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())

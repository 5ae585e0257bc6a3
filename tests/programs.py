"""Programs as a user starts them, each in a process of its own; torch and frameworks are imported once for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Forked by a process that has imported them and done nothing else: it has no threads, and CUDA has not started in it.
FORKS = """
import gc, json, os, runpy, sys, tempfile, traceback
import lightning, peft, torch, transformers.trainer, trl.trainer.dpo_trainer, zokern
import torch._dynamo, transformers.models.llama.modeling_llama
gc.freeze()  # a Trainer collects garbage at each train(), for long among what was imported

def run(command, folder):
    code = 1
    try:
        os.chdir(folder)
        sys.argv = command
        (runpy.run_path if command[0].endswith(".py") else runpy.run_module)(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

done = []
for command, folder in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            run(command, folder)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        done.append((status, said.read()))
print(json.dumps(done))
"""


@dataclass(frozen=True)
class Program:
    """A script's path or a module's name, its arguments, and the folder that it runs in."""

    command: list[str]
    folder: Path = ROOT


@dataclass(frozen=True)
class Done:
    """How a program ended: its exit code, negative for a signal, and all that it printed."""

    code: int
    said: str


def run(programs: dict[str, Program]) -> dict[str, Done]:
    """How each ended, by its name."""
    # A GPU-less machine's TRITON_INTERPRET of this suite is no business of a fresh process.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = {**inherited, "PYTHONPATH": str(ROOT)}  # this source, whatever is installed
    told = json.dumps([(p.command, str(p.folder)) for p in programs.values()])
    done = subprocess.run(
        [sys.executable, "-c", FORKS, told], cwd=ROOT, capture_output=True, text=True, env=env, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name: Done(*each) for name, each in zip(programs, json.loads(done.stdout), strict=True)}

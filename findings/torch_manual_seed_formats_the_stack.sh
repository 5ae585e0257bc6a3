#!/usr/bin/env bash
# In PyTorch 2.13 each torch.manual_seed formats the whole call stack, once for each kind of device that was not started.
#
# A seed of all devices has to reach those that start later too. For CUDA, XPU and MTIA it is kept until then, together with
# the text of the stack that set it, source lines and all: three times on a machine with processors alone, and two where CUDA
# runs. Under a test runner or a Trainer, whose stacks are deep, that takes milliseconds, of which the seed itself takes
# microseconds, and each call asks the file system about each file of the stack. A generator's own manual_seed does none of it.
#
# It matters to whoever seeds in each step or each pass, as the released code of MeZO does four times a step, and to suites of
# tests that begin with a seed. What helps: torch.default_generator.manual_seed(seed), where the processor's draws are meant.
#
# In zokern: no step seeds a generator of torch, as noise is a function of seed and place. The tests take the keeping away
# from devices that are not there (tests/waste.py).
#
# Seen in torch 2.13.0 for processors (for CUDA by its source) with numpy 2.3.5. Needs python3 with venv.
# Subject: PyTorch, compilers and number formats
# 2026-11-30
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.3.5

cat > seeds.py <<'PYTHON'
import time
import traceback

import torch

print("torch", torch.__version__.partition("+")[0])
formatted = []
format_stack = traceback.format_stack


def counted(*args, **kwargs):
    lines = format_stack(*args, **kwargs)
    formatted.append(len(lines))
    return lines


def deep(frames, call):  # two by turns, as the text leaves out repetitions
    return call() if frames == 0 else deeper(frames - 1, call)


def deeper(frames, call):
    return call() if frames == 0 else deep(frames - 1, call)


def stacks(frames, seed):
    formatted.clear()
    traceback.format_stack = counted
    deep(frames, lambda: seed(0))
    traceback.format_stack = format_stack
    return list(formatted)


def seconds(frames, seed):
    began = time.perf_counter()
    deep(frames, lambda: [seed(0) for _ in range(200)])
    return (time.perf_counter() - began) / 200


started = torch.cuda.is_available()
if started:
    torch.zeros(1, device="cuda")
near, far = (stacks(frames, torch.manual_seed) for frames in (0, 100))
print("stacks that one torch.manual_seed formats:", len(far) + started, "with CUDA counted as not started")
print("frames more for each, 100 calls deeper:", {b - a for a, b in zip(near, far)})
print("stacks that a generator's manual_seed formats:", len(stacks(100, torch.default_generator.manual_seed)))
slow, quick = seconds(100, torch.manual_seed), seconds(100, torch.default_generator.manual_seed)
print("times as long, 100 calls deep, at least:", 20 if slow > 20 * quick else slow / quick)
PYTHON
found=$(venv/bin/python -W ignore seeds.py)
echo "$found"
expected="torch 2.13.0
stacks that one torch.manual_seed formats: 3 with CUDA counted as not started
frames more for each, 100 calls deeper: {100}
stacks that a generator's manual_seed formats: 0
times as long, 100 calls deep, at least: 20"
[[ "$found" == "$expected" ]] || { echo "CHANGED: expected"; echo "$expected"; exit 1; }
echo "SEEN: torch.manual_seed formats the call stack for each kind of device that was not started"

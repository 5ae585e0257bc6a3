"""What no integration can do yet is refused by name; frameworks are imported by nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import zokern
from zokern.integrations import limits


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"cut": "tensor parallelism"}, "X: zokern does not train under tensor parallelism.*Leave it out"),
        ({"scaler": True}, "mixed precision 'fp16' has a GradScaler.*Take bf16"),
        ({"precision": "16-mixed"}, "'16-mixed' has a GradScaler"),
        ({"precision": "fp8"}, "'fp8' carries scales"),
        ({"precision": "transformer-engine-float16"}, "carries scales"),
        ({"engine": "FSDP"}, "under FSDP.*each process that torchrun starts may have the whole"),
        ({"engine": "Megatron-LM"}, "under Megatron-LM"),
        ({"engine": "model_parallel"}, "under a model-parallel strategy"),
        ({"engine": "XLA"}, "under XLA"),
    ],
)
def test_limits(facts, message):
    with pytest.raises(NotImplementedError, match=message):
        limits.refuse("X", **facts)


def test_what_is_within_the_limits():
    limits.refuse("X")
    limits.refuse("X", precision="bf16", engine="NO")
    limits.refuse("X", precision="16-true", engine="MULTI_GPU")


def test_what_accelerate_cuts_up():
    class Config:
        tp_size, cp_size, sp_size, dp_shard_size, dp_replicate_size = 2, 1, None, 4, 8

    assert limits.cut(Config()) == "tensor and sharded data parallelism"
    assert limits.cut(None) == ""


def test_frameworks_are_imported_by_their_own_file_alone():
    code = (
        "import sys, zokern, zokern.finetune, zokern.integrations, zokern.integrations.limits\n"
        "import zokern.integrations.waiting, zokern.optim.frameworks\n"
        "names = ('accelerate', 'lightning', 'pytorch_lightning', 'transformers')\n"
        "print('loaded', [name for name in names if name in sys.modules])\n"
        "for name in names: sys.modules[name] = None\n"
        "for name in ('accelerate', 'lightning'):\n"
        "    try: __import__('zokern.integrations.' + name)\n"
        "    except ImportError as error: print(error)\n"
    )
    root = str(Path(zokern.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "loaded []",
        "zokern.integrations.accelerate needs accelerate: pip install accelerate",
        "zokern.integrations.lightning needs Lightning: pip install lightning",
    ]

"""The programs of docs/distributed.md, on two ranks each with torchrun's variables, and one under torchrun's launcher."""

from __future__ import annotations

import os
import re
import runpy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.ranks import run
from tests.finetune.children import ended, fork, launched

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
BLOCKS = {
    re.findall(r"(\w+)\.py\n", block)[0]: block
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def program(text: str, folder: str, port: int) -> dict[str, Any]:
    """Runs it as a rank's main program; returns its model's weights, whole, and its optimizer's counters."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    kept: list[list[Tensor]] = []
    end = dist.destroy_process_group

    def last() -> None:
        kept.append([_whole(p) for p in names["model"].parameters()])
        end()

    dist.destroy_process_group = last
    exec(compile(text, "a program of the guide", "exec"), names)
    dist.destroy_process_group = end
    return {"weights": kept[0], **names["optimizer"].counters}


def _whole(p: Any) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def test_the_guide_has_its_programs() -> None:
    assert list(BLOCKS) == ["replicas", "directions", "fsdp", "tensor_parallel", "restart"]


@pytest.mark.parametrize("name", BLOCKS)
def test_programs_of_the_guide_run(name: str, tmp_path: Path) -> None:
    a, b = run(2, program, BLOCKS[name], str(tmp_path), free_port(), join=False)
    assert all(map(torch.equal, a.pop("weights"), b.pop("weights")))
    assert a == b
    assert a["steps"] > 0


def test_a_restart_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Stopped after 7 of 20 steps, and 3 ranks instead of 2."""
    text = BLOCKS["restart"]
    short = text.replace('["steps"] < 20', '["steps"] < 7')
    assert short != text
    run(2, program, short, str(tmp_path), free_port(), join=False)
    whole = run(3, program, text, str(tmp_path), free_port(), join=False)
    assert [one["steps"] for one in whole] == [20] * 3
    assert all(map(torch.equal, whole[0]["weights"], whole[2]["weights"]))
    import zokern

    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    assert zokern.journal.replay(tmp_path / "run.zkj", model) == 20
    assert all(map(torch.equal, whole[0]["weights"], [p.detach() for p in model.parameters()]))


def test_under_torchruns_launcher(tmp_path: Path) -> None:
    (tmp_path / "replicas.py").write_text(BLOCKS["replicas"])
    run = launched(lambda: runpy.run_path(str(tmp_path / "replicas.py"), run_name="__main__"))
    code, said = ended(fork(run, tmp_path / "said")), (tmp_path / "said").read_text()
    assert code == 0, said
    assert said.count(" sent by each") == 1
    assert re.search(r"^2 ranks, loss 0\.\d+, 19248 bytes sent by each$", said, flags=re.MULTILINE), said
    assert said.count("zokern: 2 ranks train one model") == 1

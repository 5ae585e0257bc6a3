"""The clock of a step's parts. Its GPU is a stand-in here: what is looked at is which of several GPUs it asks."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from zokern.bench import split
from zokern.finetune.clock import Clock

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Gpus:
    """Several GPUs of which the first is current. Each stream has a clock of its own that only its events advance."""

    def __init__(self) -> None:
        self.now = {FIRST: 0.0, SECOND: 0.0}
        self.waited: list[torch.device] = []
        gpus = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: torch.device = FIRST) -> None:
                self.at = gpus.now[stream]

            def elapsed_time(self, other: Any) -> float:
                assert SECOND in gpus.waited, "events are read before the device was waited for"
                return other.at - self.at

        self.Event = Event

    def current_stream(self, device: torch.device = FIRST) -> torch.device:
        return device

    def synchronize(self, device: torch.device = FIRST) -> None:
        self.waited.append(device)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    made = Gpus()
    for name in ("Event", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def test_a_second_gpu_is_timed_on_its_own_stream(gpus: Gpus) -> None:
    clock = Clock(SECOND)
    for _ in range(2):
        with clock.measure("step"):
            gpus.now[SECOND] += 250.0  # milliseconds
    assert gpus.waited == []
    assert clock.seconds() == {"step": 0.5}
    assert gpus.waited == [SECOND]
    assert clock.seconds() == {"step": 0.5}
    assert gpus.waited == [SECOND]  # nothing was new


def test_the_parts_of_a_step_on_a_second_gpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stepper:
        counters: dict[str, int] = {}  # noqa: RUF012

        def step(self, closure: Any) -> None:
            gpus.now[SECOND] += 1000.0
            closure()

    def forward() -> None:
        gpus.now[SECOND] += 3000.0

    monkeypatch.setattr(split, "_around_passes", lambda stepper, around: contextlib.nullcontext())
    parts = split.measure(Stepper(), forward, SECOND, steps=2)
    assert parts == {"step": 4.0, "forwards": 3.0, "passes": 0.0, "other": 1.0}
    assert set(gpus.waited) == {SECOND}


def test_a_block_that_raises_counts_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((3.0, 5.5))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), clock.measure("step"):
        raise ZeroDivisionError
    assert clock.seconds() == {"step": 2.5}


def test_no_code_asks_the_gpu_that_happens_to_be_current() -> None:
    """`--device cuda:1` does not make it the current one: every question about a GPU names the GPU."""
    asked = re.compile(
        r"torch\.cuda\.(?:synchronize|current_stream|default_stream|Stream|mem_get_info|(?:max_)?memory_\w+|"
        r"reset_peak_memory_stats|get_device_\w+)\(\)"
    )
    sources = [*(ROOT / "zokern").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = [f"{path.name}: {match[0]}" for path in sources for match in asked.finditer(path.read_text())]
    assert found == []

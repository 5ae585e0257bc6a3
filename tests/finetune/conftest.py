"""Pictures of runs are made and not drawn, which would be half the time of a small run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zokern import drawing

figure = drawing.figure


def not_drawn(**settings: Any) -> Any:
    made = figure(**settings)
    made.savefig = lambda path: Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")
    return made


@pytest.fixture(autouse=True, scope="module")
def _pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "figure", not_drawn)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """But in a test that asks for this."""
    monkeypatch.setattr(drawing, "figure", figure)

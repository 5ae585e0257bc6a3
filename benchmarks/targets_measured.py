"""The measured column of the table of targets: from results/kernels-*-cuda*.json, compiled/ and step-cuda*.json.

The names are those that the GPU suite gives; a figure is of the first file that has the case. It is "not yet run" until
one is stored, and "not in the run" where none has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NOT_YET, MISSING = "not yet run", "not in the run"
STEP = "opt-13b 16x256"


def _from(paths: Sequence[Path], tell: Callable[[dict[str, Any]], str]) -> str:
    """tell(results), with the GPU's name."""
    stored = [path for path in paths if path.is_file()]
    for path in stored:
        record = json.loads(path.read_text())
        try:
            return f"{tell(record['results'])} ({record['machine']['gpu']})"
        except KeyError:
            continue
    return MISSING if stored else NOT_YET


def _ways(results: dict[str, Any], title: str) -> dict[str, Any]:
    ways: dict[str, Any] = results[title]["ways"]
    return ways


def _share(results: dict[str, Any], title: str) -> str:
    return f"{_ways(results, title)['zokern cuda']['share_of_copy']:.0%}"


def _over(results: dict[str, Any], peer: str) -> str:
    return f"{_ways(results, AXPY)['zokern cuda']['speedup_over'][peer]:.1f} x"


def _triton(results: dict[str, Any]) -> str:
    ways = _ways(results, AXPY)
    return f"{ways['zokern triton']['median'] / ways['zokern cuda']['median'] - 1:+.0%}"


def _ours(results: dict[str, Any], method: str, also: str = "") -> dict[str, Any]:
    """The fastest timed step of ours that has parts, or the one named."""
    found = [
        r for name, r in results.items()
        if name.startswith(f"{STEP} {method} ") and r["status"] == "timed" and not r["peer"] and "passes" in r
        and also in name
    ]  # fmt: skip
    if not found:
        raise KeyError(method)
    best: dict[str, Any] = min(found, key=lambda r: r["step"]["median"])
    return best


def _step_over(results: dict[str, Any], method: str) -> str:
    theirs, ours = results[f"{STEP} {method} published"], _ours(results, method)
    curvature = f" with h in {ours['curvature_dtype']}" if "curvature_dtype" in ours else ""
    return f"{theirs['step']['median'] / ours['step']['median']:.2f} x{curvature}"


def _passes(results: dict[str, Any]) -> str:
    mezo = _ours(results, "mezo")
    return f"{mezo['passes'] / mezo['step']['median']:.1%}"


AXPY = "axpy, K = 1, bfloat16"


def column(folder: Path) -> list[str]:
    """In the order of targets.WANTED."""
    axpy = [*sorted(folder.glob("kernels-axpy-cuda*.json")), folder / "compiled" / "kernels-axpy-cuda.json"]
    step = sorted(folder.glob("step-cuda*.json"))
    return [
        _from(axpy, lambda r: _share(r, AXPY)),
        _from(axpy, lambda r: _share(r, "axpy, K = 1, float32")),
        _from([folder / "kernels-hizoo-cuda.json"], lambda r: _share(r, "HiZOO update, h float32, bfloat16")),
        _from([folder / "kernels-rademacher-cuda.json"], lambda r: _share(r, "axpy, Rademacher, bfloat16")),
        _from(axpy, _triton),
        _from(axpy, lambda r: _over(r, "published")),
        _from(axpy, lambda r: _over(r, "compiled")),
        _from(step, _passes),
        _from(step, lambda r: _step_over(r, "mezo")),
        _from(step, lambda r: _step_over(r, "hizoo")),
        _from(step, lambda r: f"{_ours(r, 'mezo', 'stream')['extra_share']:.1%}"),
    ]

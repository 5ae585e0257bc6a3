"""Which row of machine_code.json is a benchmark's kernel, and what model.py makes of it; or why nothing is predicted.

The rows are in a checkout, not in the package, and were compiled by the compilers that they name: Triton compiles anew on
each machine, perhaps with another version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zokern.bench import model
from zokern.bench.cases import Case
from zokern.bench.limits import bytes_per_element
from zokern.bench.record import RESULTS
from zokern.contract.rules import RULES

MACHINE_CODE = RESULTS / "machine_code.json"


@dataclass(frozen=True)
class Basis:
    """What predictions rest on. device: the model's name of it."""

    device: str
    rows: Sequence[Mapping[str, Any]]
    compilers: Mapping[str, str]

    def facts(self) -> dict[str, Any]:
        """For a record. issue_per_second: instructions of a thread, all multiprocessors together."""
        figures = model.DEVICES[self.device]
        rate = figures.multiprocessors * figures.clock * model.ISSUE
        return {"device": self.device, **asdict(figures), "issue_per_second": rate, "compilers": dict(self.compilers)}


def basis(device: torch.device, path: Path = MACHINE_CODE) -> Basis | str:
    """What there is to predict from on `device`, or why there is nothing."""
    if device.type != "cuda":
        return "the model is of GPUs"
    try:
        name = model.short_name(torch.cuda.get_device_name(device))
    except ValueError as error:
        return f"zokern/bench/model.py has no figures of this GPU: {error}"
    here, modelled = torch.cuda.get_device_properties(device).multi_processor_count, model.DEVICES[name].multiprocessors
    if here != modelled:
        return f"this {name} has {here} multiprocessors and the one in zokern/bench/model.py {modelled}: it is another"
    if not path.is_file():
        return f"there is no {path.name}: it is in a checkout of zokern (benchmarks/results), not in the package"
    stored = json.loads(path.read_text())
    return Basis(name, stored["kernels"], stored["compilers"])


def row_of(case: Case, backend: str, rows: Sequence[Mapping[str, Any]], arch: int) -> Mapping[str, Any] | None:
    """The row of the case's kernel; None where none was counted.

    A kernel that decides at run time ("any") was counted with normals, rounding to nearest; a chain both ways.
    """
    chain = case.stages > 1
    wanted: dict[str, tuple[Any, ...]] = {
        "arch": (arch,), "backend": (backend,), "kernel": ("chain" if chain else "pass",), "rule": (case.rule,),
        "dtype": (case.dtype,), "state": (case.state_dtype if RULES[case.rule].states else "float32",),
        "seeds": ("one",) if backend == "cuda" and case.seeds == 1 and not chain else ("any",),
        "distribution": (case.distribution, "any") if case.distribution == "normal" else (case.distribution,),
        "rounding": (case.rounding, "any") if chain or case.rounding == "nearest" else (case.rounding,),
    }  # fmt: skip
    return next((row for row in rows if all(row[key] in allowed for key, allowed in wanted.items())), None)


def of(case: Case, backend: str, basis: Basis | str) -> dict[str, Any]:
    """{"slots" (per element), "predicted_share" (of the copy bandwidth)}, or {"not_predicted": the reason}."""
    if isinstance(basis, str):
        return {"not_predicted": basis}
    arch = model.DEVICES[basis.device].arch
    row = row_of(case, backend, basis.rows, arch)
    if row is None:
        return {"not_predicted": f"{MACHINE_CODE.name} has no such kernel of {backend} for sm_{arch}"}
    stochastic = case.stochastic_stages if case.stages > 1 else 0  # one pass that rounds so has a row of its own
    pipes = model.instructions(row, seeds=case.seeds, stages=case.stages, stochastic=stochastic)
    share = model.predicted_share(row, bytes_per_element(case), basis.device, pipes)
    return {"slots": sum(pipes.values()), "predicted_share": share}

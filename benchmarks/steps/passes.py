"""The passes of a step beside the same kernels alone, and what the clock explains of it, for docs/benchmarks.md.

Alone: ns per element of the kernel benchmarks, times the parameters. The clock under load: results/clocks-cuda.json. What
it explains is computed by zokern/bench/model.py, whose compute time is inverse to the clock, its memory time not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.kernels.targets import AXPY, HIZOO, MODEL, PEAK, PROBE, STEP, TOKENS, step_of
from benchmarks.parts import Record, gpus, load, short_gpu
from zokern.bench import model, prediction
from zokern.bench.cases import Case
from zokern.bench.limits import bytes_per_element

PERTURB, UPDATE = (Case("", "axpy", "bfloat16", rounding=rounding) for rounding in ("nearest", "stochastic"))
PASSES: Mapping[str, tuple[Case, ...]] = {"mezo": (PERTURB, PERTURB, UPDATE), "hizoo": (PROBE, PROBE, HIZOO)}
ALONE, IN_A_STEP = "kernels", "step-13b"  # sections of the GPU suite
SAME = ("rule", "dtype", "state_dtype", "distribution", "rounding", "seeds", "stages", "left_out")


@cache
def _kernels(folder: Path) -> list[Any]:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels-*-cuda.json"))]
    return [result for run in runs for result in run["results"].values()]


def _ns(folder: Path, case: Case) -> float:
    """Of an element, by CUDA."""
    wanted = {key: getattr(case, key) for key in SAME}
    found = [r for r in _kernels(folder) if all(r["case"][key] == value for key, value in wanted.items())]
    ns: float = found[0]["ways"]["zokern cuda"]["ns_per_element"]
    return ns


def alone(folder: Path, method: str, parameters: int) -> float:
    """Seconds of a step's passes by their kernels' own times."""
    return 1e-9 * parameters * sum(_ns(folder, case) for case in PASSES[method])


def slower(method: str, device: str, clock: float) -> float:
    """Predicted time of a step's passes at `clock`, over that at the highest."""
    stored = json.loads(prediction.MACHINE_CODE.read_text())
    figures, times = model.DEVICES[device], [0.0, 0.0]
    for case in PASSES[method]:
        row = prediction.row_of(case, "cuda", stored["kernels"], figures.arch)
        assert row is not None, case
        memory, (_, compute) = bytes_per_element(case) / figures.copy_bandwidth, model.compute_limit(row, device)
        for i, factor in enumerate((1.0, figures.clock / clock)):
            times[i] += (memory**model.SHARPNESS + (factor * compute) ** model.SHARPNESS) ** (1 / model.SHARPNESS)
    return times[1] / times[0]


def _more(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%} {'more' if ratio >= 1 else 'less'}"


def _stored(folder: Path) -> Record:
    run: Record = json.loads((folder / f"step-cuda-{MODEL}.json").read_text())
    return run


def over_alone(folder: Path, method: str) -> float:
    """A step's passes over the same by their kernels' own times."""
    step = step_of(_stored(folder)["results"], method)
    return float(step["passes"]) / alone(folder, method, step["parameters"])


def reached(folder: Path) -> float:
    """The share of the bfloat16 peak at which the forwards of a MeZO step run."""
    step = step_of(_stored(folder)["results"], "mezo")
    return float(2 * step["forwards_per_step"] * step["parameters"] * TOKENS / (step["forwards"] * PEAK))


def at_copys_speed(folder: Path) -> float:
    """The share of a MeZO step that its passes would be if each took as long as a copy of its bytes."""
    run = json.loads((folder / "kernels-axpy-cuda.json").read_text())
    step = step_of(_stored(folder)["results"], "mezo")
    moved = step["parameters"] * sum(map(bytes_per_element, PASSES["mezo"]))
    passes = moved / (1e9 * run["results"][AXPY.title]["ways"]["copy"]["gb_per_s"])
    return float(passes / (step["step"]["median"] - step["passes"] + passes))


def passes_part() -> str:
    """The first GPU's times; of the others ratios."""
    (gpu, folder), *others = gpus().items()
    results = _stored(folder)["results"]
    mezo, hizoo, published = step_of(results, "mezo"), step_of(results, "hizoo"), results[f"{STEP} mezo published"]
    own = [1e3 * alone(folder, method, mezo["parameters"]) for method in PASSES]
    each = published["passes"] / published["passes_per_step"] / (mezo["passes"] / mezo["passes_per_step"])
    ms = [1e3 * step["passes"] for step in (mezo, hizoo)]
    told = [
        f"In a step of OPT-13B on the {gpu}, MeZO's {mezo['passes_per_step']:.0f} passes take {ms[0]:.1f} ms: "
        f"{_more(over_alone(folder, 'mezo'))} than by their kernels' own times above, {own[0]:.1f}. At the speed of a copy "
        f"they would still be {at_copys_speed(folder):.1%} of the step, whose forwards run at {reached(folder):.0%} of the "
        f"peak. HiZOO's take {ms[1]:.1f}, {_more(over_alone(folder, 'hizoo'))} than by theirs, {own[1]:.1f}. "
        f"A published sweep takes {each:.1f} times as long as a pass of MeZO's."
    ]
    for name, at in others:
        told.append(
            f"On the {name} MeZO's passes took {_more(over_alone(at, 'mezo'))} than their kernels alone, HiZOO's "
            f"{_more(over_alone(at, 'hizoo'))}, and the forwards ran at {reached(at):.0%}."
        )
    return " ".join(told)


def _clock(section: Record) -> str:
    mean, lowest = (f"{section['clock'][key] / 1e9:.2f}" for key in ("mean", "min"))
    return f"{mean} GHz throughout" if mean == lowest else f"{mean} GHz in the mean and {lowest} at the lowest"


def _capped(section: Record) -> str:
    share = f"{section['power_capped']:.0%}" if section["power_capped"] else "none"
    return f"{share} of {section['under_load']} samples"


def clock_part() -> str:
    run = load("clocks-cuda.json")
    (gpu, folder), *others = gpus().items()
    if short_gpu(run) != gpu:
        raise SystemExit(
            f"clocks-cuda.json is of an {short_gpu(run)}, the kernels are of an {gpu}: sample beside the suite"
        )
    quiet, busy, settings = run["results"][ALONE], run["results"][IN_A_STEP], run["settings"]
    mean = busy["clock"]["mean"]
    mezo, hizoo = (slower(method, gpu, mean) - 1 for method in ("mezo", "hizoo"))
    told = [
        f"{settings['tool']} beside the suite on the {gpu}, a sample each {settings['seconds_apart']:.1f} s, those under "
        f"load: while kernels ran alone, the clock was {_clock(quiet)}, and the power limit held down {_capped(quiet)}; "
        f"during steps of OPT-13B it held down {_capped(busy)}, and the clock was {_clock(busy)}. At that mean, MeZO's "
        f"passes, whose arithmetic takes nearly as long as their bytes, would by the model take {mezo:.1%} more time, of "
        f"the {over_alone(folder, 'mezo') - 1:.1%} that they took, and HiZOO's {hizoo:.1%}."
    ]
    for name, at in others:
        same = slower("mezo", name, mean) - 1
        told.append(
            f"On the {name} nothing was sampled; the same mean would account for {same:.0%} of the "
            f"{over_alone(at, 'mezo') - 1:.0%}, and the rest is not explained."
        )
    return " ".join(told)


PAGES = {"docs/benchmarks.md": {"passes-in-a-step": passes_part, "clock": clock_part}}

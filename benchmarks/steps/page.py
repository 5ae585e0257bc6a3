"""Whole steps and sizes, for docs/steps.md and docs/graphs.md, from results/step-c*.json and scaling-cpu.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.parts import IMAGES, RESULTS, Record, load, made_on, short_gpu, table
from zokern.bench import plots
from zokern.bench import tables as step_tables


def step_part(name: str = "step-cpu.json") -> str:
    run = load(name)
    settings = run["settings"]
    sizes = {r["model"]: r["parameters"] for r in run["results"].values()}
    told = ", ".join(f"{name} has {count / 1e6:.1f} million parameters" for name, count in sizes.items())
    head = f"{made_on(run)}; {settings['dtype']}, {settings['rounds']} rounds of {settings['steps']}; ms. {told}."
    head += rounds_told(run["results"], settings["rounds"])
    notes = step_tables.step_notes(run["results"], settings.get("not_timed", {}))
    return "\n\n".join([head, table(step_tables.STEP_COLUMNS, step_tables.step_rows(run["results"])), *notes])


def rounds_told(results: Mapping[str, Any], wanted: int) -> str:
    """Of how many rounds the times are, where the time limit left fewer than were wanted."""
    fewer: dict[int, list[str]] = {}
    for name, result in results.items():
        if result["status"] == "timed" and result["step"]["rounds"] < wanted:
            fewer.setdefault(result["step"]["rounds"], []).append(name)
    if not fewer:
        return ""
    told = [f"{count} of {cases[0] if len(cases) == 1 else f'{len(cases)} cases'}" for count, cases in fewer.items()]
    return f" The time sufficed for no more rounds than {', '.join(told)}."


def waiting_part() -> str:
    """The demo's MeZO step with OpenMP threads that sleep while they wait, from a run of its own."""
    run = load("step-cpu-passive.json")
    assert run["settings"]["omp_wait_policy"] == "PASSIVE"
    step = run["results"]["demo 16x32 mezo inplace"]
    share = step["passes"] / step["step"]["median"]
    return (
        "In a run of its own with `OMP_WAIT_POLICY=PASSIVE`, in which they sleep, the passes take "
        f"{1e3 * step['passes']:.1f} of the {1e3 * step['step']['median']:.0f} ms of the demo's MeZO step, {share:.1%}."
    )


def gpu_part() -> str:
    """What the GPU suite stored."""
    stored = sorted(RESULTS.glob("step-cuda*.json"))
    parts = [f"{step_part(p.name)}\n\n![Where the time of a step goes](images/{p.stem}.png)" for p in stored]
    return "\n\n".join(parts) or "**Not yet run on a GPU.**"


def spread(rows: Sequence[Record]) -> str:
    """How far the slowest size lies above the fastest, for each type, method and placement."""
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["status"] == "timed":
            name = f"{row['dtype']} {row['method']} {row['placement']}"
            times.setdefault(name, []).append(row["ns_per_parameter"]["median"])
    told = ", ".join(f"{max(t) / min(t) - 1:.0%} ({name})" for name, t in times.items())
    return f"Slowest size over the fastest: {told}."


def scaling_part() -> str:
    run = load("scaling-cpu.json")
    rows = run["results"]
    head = f"{made_on(run)}; {run['settings']['rounds']} rounds. {spread(rows)}"
    told = table(step_tables.SCALING_COLUMNS, step_tables.scaling_rows(rows))
    return "\n\n".join([head, told, *step_tables.scaling_notes(rows)])


def short_gpu_part() -> str:
    """Whole steps on a GPU: of a large model in place, of a smaller one from a CUDA graph."""
    large, small = load("step-cuda-opt-13b.json"), load("step-cuda-opt-1.3b.json")
    short = load("step-cuda-opt-13b-16x40.json")

    def told(run: Record, case: str, way: str) -> str:
        if f"{case} {way}" not in run["results"]:
            return "-"
        theirs, ours = (run["results"][f"{case} {w}"]["step"]["median"] for w in ("published", way))
        return f"{1e3 * ours:.3g} ms, published {1e3 * theirs:.4g} ms: **{theirs / ours:.1f} x**"

    cases: Any = (
        ("OPT-13B, 16 x 40, in place", short, "opt-13b 16x40", "inplace"),
        ("OPT-13B, 16 x 256, in place", large, "opt-13b 16x256", "inplace"),
        ("OPT-1.3B, 16 x 256, in a CUDA graph", small, "opt-1.3b 16x256", "graphed"),
        ("OPT-1.3B, 16 x 32, in a CUDA graph", small, "opt-1.3b 16x32", "graphed"),
    )
    rows = [[title, *(told(run, f"{c} {m}", way) for m in ("mezo", "hizoo"))] for title, run, c, way in cases]
    head = f"Whole steps on the {short_gpu(large)}, bfloat16:"
    return f"{head}\n\n{table(['model, tokens', 'MeZO', 'HiZOO'], rows, tight=True)}"


def _median(run: Record, case: str) -> float:
    """ms of a step."""
    return 1e3 * float(run["results"][case]["step"]["median"])


def reading_part() -> str:
    """How to read the GPU's tables."""
    small, large = load("step-cuda-opt-1.3b.json"), load("step-cuda-opt-13b.json")
    short = {
        way: _median(small, f"opt-1.3b 16x32 mezo {way}")
        for way in ("inplace", "graphed", "stream", "stream-pipelined")
    }
    long = [
        _median(large, name) for name, r in large["results"].items()
        if r["method"] == "mezo" and not r["peer"] and r["status"] == "timed"
    ]  # fmt: skip
    forwards = 1e3 * small["results"]["opt-1.3b 16x32 mezo inplace"]["forwards"]
    more, most = (short[way] - short["inplace"] for way in ("stream", "stream-pipelined"))
    return (
        "Read it so: **where forwards are short, a step is as long as Python takes to queue it.** With sixteen rows of 32 "
        f"tokens, an eager MeZO step of OPT-1.3B takes {short['inplace']:.0f} ms in place, {forwards:.0f} of them in its "
        "forwards, whose kernels wait for Python; a graph, which does not, takes "
        f"{short['graphed']:.0f} for all of the step. `stream` calls Python before and after each block, which adds "
        f"{more:.0f} ms to that step, and {most:.0f} if it is pipelined: take `inplace` or a graph there. With 4,096 "
        f"tokens on OPT-13B all ways of ours are within {max(long) / min(long) - 1:.0%} of each other."
    )


def gain_part() -> str:
    """docs/graphs.md: what a graph gains."""
    small, large = load("step-cuda-opt-1.3b.json"), load("step-cuda-opt-13b.json")
    graphed, eager = (_median(small, f"opt-1.3b 16x32 mezo {way}") for way in ("graphed", "inplace"))
    after, before = (_median(large, f"opt-13b 16x256 mezo {way}") for way in ("graphed", "inplace"))
    return (
        f"On an {short_gpu(small)}, OPT-1.3B with 16 rows of 32 tokens takes {graphed:.1f} ms a MeZO step instead of "
        f"{eager:.1f}, and OPT-13B with 4,096 tokens, which keeps the GPU busy anyhow, {after:.0f} instead of {before:.0f}."
    )


def short_cpu_part() -> str:
    """Of the demo's model, in the published order and in place."""
    run = load("step-cpu.json")
    theirs, ours = (run["results"][f"demo 16x32 mezo {way}"] for way in ("published", "inplace"))
    shares = [r["passes"] / r["step"]["median"] for r in (theirs, ours)]
    faster = theirs["step"]["median"] / ours["step"]["median"]
    return (
        f"Of a whole MeZO step on the demo's model ({ours['parameters'] / 1e6:.1f} million parameters, {ours['tokens']} "
        f"tokens, {run['machine']['threads']} threads) the passes take {shares[1]:.0%}; in the published order of work "
        f"they take {shares[0]:.0%}, and the step {faster:.1f} times as long."
    )


def draw() -> None:
    stored = [path for kind in ("step", "scaling") for path in RESULTS.glob(f"{kind}-c*.json")]
    plots.draw(sorted(path for path in stored if not path.stem.endswith("passive")), IMAGES)


PAGES = {
    "docs/steps.md": {
        "short-gpu": short_gpu_part, "short-cpu": short_cpu_part,
        "step": step_part, "step-waiting": waiting_part, "step-gpu": gpu_part, "step-reading": reading_part,
        "scaling": scaling_part,
    },
    "docs/graphs.md": {"gain": gain_part},
}  # fmt: skip

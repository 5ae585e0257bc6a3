"""Writes the CPU's tables of docs/llm.md from benchmarks/results/llm-cpu.json and llm-cost-cpu.json.

Also from what is there of them: what is missing is said.
"""

from __future__ import annotations

from benchmarks.llm import stored_cpu
from benchmarks.llm.bench import CONTEXT
from benchmarks.llm.methods import METHODS, SEEDS
from benchmarks.llm.search import best, next_lr, wants_lower
from benchmarks.llm.stored_cpu import COST, NONE, RUNS, ends, losses, spread
from benchmarks.parts import Record, made_on, table


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e9:.2f} GB"


def _cost(name: str, steps: int) -> list[str]:
    """The time of a step in forwards, that of all steps in seconds, and memory beside a forward."""
    if name not in stored_cpu.costs():
        return ["", "", ""]
    found = stored_cpu.costs()[name]
    extra = max(found["bytes"] - found["forward_bytes"], 0)
    return [f"{stored_cpu.in_forwards(name):.2f}", f"{steps * stored_cpu.step_seconds(name):.0f}", megabytes(extra)]


def _accuracy(runs: list[Record], look: int) -> str:
    gone = sum(run["curve"][look]["loss"] is None for run in runs)
    return spread(ends(runs, look)) + (f" ({gone} diverged)" if gone else "")


def runs() -> str:
    """A line for each method."""
    found = stored_cpu.results()
    if "start" not in found:
        return NONE
    budget = stored_cpu.stored(RUNS)["settings"]["budget"]
    head = ["method", "lr", "steps × forwards", f"accuracy after {budget // 2} forwards, %", f"after {budget}, %", "seeds",
            "time of a step, forwards", "of all steps, seconds", "memory beside a forward"]  # fmt: skip
    rows = []
    for name, method in stored_cpu.ran().items():
        curve = [_accuracy(method["runs"], look) for look in (0, -1)]
        steps, seeds = method["runs"][0]["steps"], str(len(method["runs"]))
        spent = f"{steps} × {METHODS[name].forwards}"
        rows.append([method["label"], f"{method['runs'][0]['lr']:g}", spent, *curve, seeds, *_cost(name, steps)])
    if examples := found[CONTEXT]["runs"]:
        shown = spread([100 * run["accuracy"] for run in examples])
        rows.append(
            [f"{found[CONTEXT]['examples']} examples in the prompt", "", "", "", shown, str(len(examples)), *[""] * 3]
        )
    rows.append(["as it is (zero-shot)", "", "", "", f"{100 * found['start']['test']['accuracy']:.1f}", *[""] * 4])
    return table(head, rows, tight=True)


def lowered() -> str:
    """The methods whose mean loss rose in the second half, with one seed, beside the next lower lr."""
    if "start" not in stored_cpu.results():
        return NONE
    budget = stored_cpu.stored(RUNS)["settings"]["budget"]
    half = f"loss after {budget // 2}"
    ends_at = [half, f"after {budget}", "accuracy, %"]
    head = ["method", "lr", *ends_at, "next lower lr", *ends_at]
    rows = []
    for method in stored_cpu.ran().values():
        for run in method.get("lower", []):
            rows.append([method["label"]])
            for one in ([other for other in method["runs"] if other["seed"] == run["seed"]], [run]):
                shown = [spread(losses(one, 0), 3), spread(losses(one), 3), _accuracy(one, -1)]
                rows[-1] += [f"{one[0]['lr']:g}", *shown]
    if not rows:
        return "It is not known before all seeds have run." if _unfinished() else "No method's mean loss rose."
    return table(head, rows, tight=True)


def grids() -> str:
    """The validation loss of each lr that was tried."""
    lines = []
    for name, method in stored_cpu.results().get("methods", {}).items():
        if name not in METHODS or not method["grid"]:
            continue
        grid = sorted(method["grid"], key=lambda point: point["lr"])
        tried = ", ".join(f"{p['lr']:g}: {'none' if p['loss'] is None else format(p['loss'], '.3f')}" for p in grid)
        done = next_lr(METHODS[name].grid, method["grid"]) is None
        chosen = f"; taken: {best(method['grid']):g}" if done else "; not done"
        lines.append(f"- {method['label']}: {tried}{chosen}")
    return "\n".join(lines) or NONE


def states() -> str:
    """What the states of methods that keep some have become, where a run has said so."""
    lines = []
    for method in stored_cpu.ran().values():
        kept = [run["states"] for run in method["runs"] if run.get("states")]
        for name in kept[0] if kept else ():
            least, largest = min(one[name]["least"] for one in kept), max(one[name]["largest"] for one in kept)
            means = spread([one[name]["mean"] for one in kept], 4)
            lines.append(f"- {method['label']}, {name}: {least:.3g} to {largest:.3g}, mean {means}")
    return "\n".join(lines) or "No run has said it yet."


def _told(key: str) -> list[str]:
    """The values that runs have of what is kept with each."""
    found = stored_cpu.results()
    parts = [method.get(part, []) for method in found["methods"].values() for part in ("grid", "runs", "lower")]
    return sorted({run[key] for part in [*parts, found[CONTEXT]["runs"]] for run in part if key in run})


def _unfinished() -> str:
    """Which runs are not there yet; "" for none."""
    found = stored_cpu.results().get("methods", {})
    seeds = {name: len(found.get(name, {"runs": []})["runs"]) for name in METHODS}
    none = [METHODS[name].label for name, count in seeds.items() if count == 0]
    some = [f"{METHODS[name].label} ({count})" for name, count in seeds.items() if 0 < count < len(SEEDS)]
    told = f" **Not run yet: {'; '.join(none)}.**" if none else ""
    told += f" **Not all {len(SEEDS)} seeds yet: {'; '.join(some)}.**" if some else ""
    less = [METHODS[name].label for name in METHODS if name in found and wants_lower(found[name], len(SEEDS))]
    return told + (f" **Not run with a lower lr yet: {'; '.join(less)}.**" if less else "")


def machine() -> str:
    if "start" not in stored_cpu.results():
        return NONE
    told = made_on(stored_cpu.stored(RUNS)).replace("One run", "Runs", 1)
    if others := [one for one in _told("processor") if one != stored_cpu.stored(RUNS)["machine"].get("processor")]:
        told += f"; others on {' and '.join(others)}"
    if commits := _told("commit"):
        told += f"; runs that say it, at {', '.join(commit[:12] for commit in commits)}"
    if stored_cpu.stored(COST):
        told += f"; time and memory in processes of their own, commit {stored_cpu.stored(COST)['commit'][:12]}"
    unmeasured = [METHODS[name].label for name in METHODS if name not in stored_cpu.costs()]
    more = f" **Time and memory not measured yet: {'; '.join(unmeasured)}.**" if unmeasured else ""
    return f"{told}.{_unfinished()}{more}"


PAGES = {
    "docs/llm.md": {
        "cpu-runs": runs, "cpu-lower": lowered, "cpu-grids": grids, "cpu-states": states, "cpu-machine": machine,
    }
}  # fmt: skip

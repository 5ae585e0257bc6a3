"""Writes the rewards' part of docs/trl.md and its picture from benchmarks/results/rewards-cpu.json."""

from __future__ import annotations

from statistics import mean, median

from benchmarks.convergence.page import COLOURS
from benchmarks.lowrank.populations import ALONE, DENSE, TOGETHER
from benchmarks.parts import Record, load, made_on, panels, plain, save, table
from benchmarks.rewards import objective

FILE, PICTURE = "rewards-cpu.json", "rewards"


def results() -> Record:
    found: Record = load(FILE)["results"]
    return found


def _shares(method: Record, look: int) -> list[float]:
    """Of each seed, how many of the prompts held out have answers of the form, in %."""
    return [100 * run["exact"][look] for run in method["runs"]]


def runs() -> str:
    """A line for each method."""
    head = ["method", "lr", "seeds", "reward (of 3)", "of the exact form, %", "each seed", "minutes", "journal"]
    rows = []
    for method in results()["methods"].values():
        every = method["runs"]
        before, after = (mean(run["reward"][look] for run in every) for look in (0, -1))
        share = f"{mean(_shares(method, 0)):.0f} -> **{mean(_shares(method, -1)):.0f}**"
        rows.append([
            method["label"], f"{method['lr']:g}", str(len(every)), f"{before:.2f} -> {after:.2f}", share,
            ", ".join(f"{one:.0f}" for one in _shares(method, -1)), f"{median(run['seconds'] for run in every) / 60:.1f}",
            f"{max(run['journal_bytes'] for run in every) / 1000:.0f} kB",
        ])  # fmt: skip
    return table(head, rows)


def written() -> str:
    """What it wrote before and after: of each method, the first seed."""
    found = results()
    things = objective.THINGS[objective.PARTS["test"]]
    every = found["methods"].values()
    rows = [
        [thing, *(_cell(one) for one in (before, *(method["runs"][0]["written"][i] for method in every)))]
        for i, (thing, before) in enumerate(zip(things, found["before"], strict=False))
    ]
    return table(["about", "before", *(method["label"] for method in every)], rows)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def facts() -> str:
    """The run, and what a generate() for all directions is worth."""
    run = load(FILE)
    settings, side = run["settings"], run["results"]["side"]
    faster = [side[name]["faster_than_dense"] for name in (ALONE, TOGETHER)]
    return (
        f"{made_on(run)}: {settings['steps']} steps of {settings['forwards']} directions over {settings['batch']} prompts, "
        f"at most {settings['tokens']} tokens, greedy, eps {settings['eps']:g}, rank 1, all weights; "
        f"{len(objective.rows('test'))} prompts held out. lr: of half-decades, that with the highest reward on "
        f"{len(objective.rows('validation'))} others after {settings['trial']} steps of a seed of its own. A step of ES "
        f"with all {settings['forwards']} in one `generate()` takes {side[TOGETHER]['seconds']:.1f} s, **{faster[1]:.1f} "
        f"times faster than dense directions in place**, one after another ({side[DENSE]['seconds']:.1f} s); low rank, one "
        f"after another, {faster[0]:.2f} times. `python -m benchmarks.rewards.run`"
    )


def picture() -> str:
    """The line that shows what draw() makes."""
    return f"![The reward, and the share of answers of the exact form, on prompts held out](images/{PICTURE}.png)"


def draw() -> None:
    """Both against steps: each seed thin, their mean thick."""
    figure, both = panels(2, 9, 3.4)
    for axes, key, factor, what in zip(
        both, ("reward", "exact"), (1, 100), ("reward, of 3", "answers of the exact form, %"), strict=True
    ):
        for name, method in results()["methods"].items():
            every, colour = method["runs"], COLOURS[name]
            looks = every[0]["looks"]
            for run in every:
                axes.plot(looks, [factor * one for one in run[key]], color=colour, linewidth=0.7, alpha=0.5)
            middle = [factor * mean(run[key][i] for run in every) for i in range(len(looks))]
            axes.plot(looks, middle, color=colour, linewidth=2, label=method["label"])
        axes.set_xlabel("step")
        axes.set_ylabel(f"{what}, held out")
        plain(axes)
    both[1].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, PICTURE, metadata={"Software": None})


PAGES = {
    "docs/trl.md": {
        "rewards-runs": runs, "rewards-picture": picture, "rewards-written": written, "rewards-facts": facts,
    }
}  # fmt: skip

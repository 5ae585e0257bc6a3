"""What a step of 8 to 10,000 ranks takes, on paper and in a simulation of the exchange; from constants that were measured.

    python -m benchmarks.ranks.scale                # seconds; nothing but one core
    python -m benchmarks.ranks.scale --wires 5 30   # other networks: microseconds a message

Measured, and read from benchmarks/results: forwards, passes and the noise of one more seed of OPT-13B in bfloat16 on the
H100; the exchange of two ranks on the loopback interface. Assumed, and said: microseconds a message on networks, bytes a
second, that forwards and passes take time in proportion to the parameters of a GPU, how much forwards differ in time.
Stores benchmarks/results/ranks-scale-cpu.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks import study
from benchmarks.parts import IMAGES, load, short_gpu, table
from benchmarks.ranks.ring import Wire, gather, in_two_levels, notice
from zokern.bench import plots
from zokern.bench.record import store

WORLDS = (8, 64, 512, 4096, 10_000)
MODELS = {"13B": 13e9, "70B": 70e9, "405B": 405e9, "1T": 1e12}
HEADER, NUMBER = 32, 8  # bytes of a rank's exchange: before its losses, and each
GPU, ROOM = 80e9, 0.85  # bytes of one, and the share that weights may take
NODE = 8
BANDWIDTH = 12.5e9  # bytes a second of a rank's network
SPREAD = 0.01  # of forwards' times, over their mean: a standard deviation
LEAVING, TIMEOUT = 0.5, 50.0  # seconds from an error to the end of a process; exchange_timeout
WAYS = ("data", "directions", "mesh")
POPULATION = 16  # directions that a share of ranks divides on a mesh


def constants() -> dict[str, float]:
    """Seconds for each parameter: of a forward with 16 x 256 tokens, of a pass with one seed, of each seed more."""
    run = load("step-cuda-opt-13b.json")["results"]["opt-13b 16x256 mezo stream"]
    passes = load("kernels-axpy-cuda.json")["results"]

    def of_a_pass(seeds: int) -> float:
        one = passes[f"axpy, K = {seeds}, bfloat16"]
        return float(one["ways"]["zokern cuda"]["median"]) / float(one["elements"])

    ranks = load("ranks-speed-cpu.json")["results"]
    return {
        "forward": run["forwards"] / run["forwards_per_step"] / run["parameters"],
        "pass": of_a_pass(1),
        "seed": (of_a_pass(16) - of_a_pass(1)) / 15,
        "loopback": next(iter(ranks.values()))["exchange"],
    }


def gpus_of(parameters: float) -> int:
    """That hold a replica of so many parameters in bfloat16."""
    return math.ceil(2 * parameters / (ROOM * GPU))


def step(parameters: float, ranks: int, parallel: str, found: Mapping[str, float], exchange: float) -> float:
    """Seconds of a MeZO step. data: one direction, each replica its own 16 x 256 tokens. directions: each replica has
    one of its own, and all of them are in each one's update. mesh: 16 directions over 16 replicas, data over the rest."""
    gpus = gpus_of(parameters)
    here, replicas = parameters / gpus, ranks / gpus
    seeds = {"data": 1.0, "directions": max(replicas, 1.0), "mesh": min(POPULATION, max(replicas, 1.0))}[parallel]
    passes = 3 * found["pass"] + (seeds - 1) * found["seed"]
    return here * (2 * found["forward"] + passes) + exchange


def simulate(worlds: list[int], wires: list[Wire], found: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Of OPT-13B with data: the exchange on each wire; what waiting for the slowest adds; when a lost rank is noticed."""
    rng, size = np.random.default_rng(0), HEADER + 2 * NUMBER
    forwards = 2 * 13e9 * found["forward"]
    results: dict[str, dict[str, float]] = {}
    for world in track(worlds, description="the ring", transient=True):
        ready = forwards * (1 + SPREAD * rng.standard_normal(world))
        one: dict[str, float] = {"slowest": float(ready.max() - ready.mean()), "bytes": float(size * (world - 1))}
        for wire in wires:
            one[f"ring, {wire.name}"] = float(gather(np.zeros(world), size, wire).max())
            one[f"step, {wire.name}"] = float(gather(ready, size, wire).max()) + 3 * 13e9 * found["pass"]
            one[f"two levels, {wire.name}"] = float(in_two_levels(np.zeros(world), size, wires[0], wire, NODE).max())
        for silent in (False, True):
            times = notice(world, world // 3, wires[-1], LEAVING, TIMEOUT, silent=silent)
            one["silent" if silent else "killed"] = float(times.max())
        results[str(world)] = one
    return results


def main() -> None:
    parser = study.parser(
        __doc__, worlds=(list(WORLDS), "numbers of ranks, multiples of 8"),
        wires=([5.0, 30.0], "microseconds a message, of a fast network and of an ordinary one"),
    )  # fmt: skip
    args = parser.parse_args()
    if any(world < NODE or world % NODE for world in args.worlds):
        parser.error(f"--worlds must be multiples of {NODE}")
    found = constants()
    wires = [Wire(f"{us:g} us", us * 1e-6, BANDWIDTH) for us in args.wires]
    results = {"constants": found, "worlds": simulate(args.worlds, wires, found)}
    settings = {"wires": [wire.name for wire in wires], "bandwidth": BANDWIDTH, "spread": SPREAD, "leaving": LEAVING,
                "timeout": TIMEOUT, "node": NODE}  # fmt: skip
    path = store("ranks-scale", torch.device("cpu"), settings, results, args.output)
    Console().print(_rows(load(path.name) if args.output is None else {"results": results, "settings": settings}))
    print("stored in", path.name)


# ------------------------------------------------------------------------------------------------------------------ pages


def _rows(run: Mapping[str, Any]) -> str:
    """The exchange by the number of ranks."""
    names, rows = run["settings"]["wires"], []
    for world, one in run["results"]["worlds"].items():
        times = [f"{_time(one[f'ring, {name}'])}, {_time(one[f'two levels, {name}'])}" for name in names]
        rows.append([f"{int(world):,}", f"{one['bytes'] / 1e3:,.1f} kB", *times, _time(one["slowest"]),
                     _time(one["killed"]), _time(one["silent"])])  # fmt: skip
    head = [f"ring, two levels: {name} a message" for name in names]
    return table(["ranks", "bytes to each", *head, "waiting for the slowest", "killed rank known", "silent one"], rows)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def exchange_part() -> str:
    run = load("ranks-scale-cpu.json")
    of = run["settings"]
    head = (
        f"Simulated: forwards of OPT-13B as measured on the {short_gpu(load('step-cuda-opt-13b.json'))}, apart by "
        f"{of['spread']:.0%} (one standard deviation); a killed rank's neighbours see its connections closed, and leave "
        f"within {of['leaving']:g} s each; of a silent one they hear nothing before exchange_timeout, {of['timeout']:g} s."
    )
    return f"{head}\n\n{_rows(run)}"


def steps_part() -> str:
    """Seconds of a step by parameters and ranks, on the slower wire."""
    run = load("ranks-scale-cpu.json")
    found, wire = run["results"]["constants"], run["settings"]["wires"][-1]
    rows = []
    for name, parameters in MODELS.items():
        gpus = gpus_of(parameters)
        for world, one in run["results"]["worlds"].items():
            if int(world) < gpus:
                continue
            times = [step(parameters, int(world), way, found, one[f"ring, {wire}"]) for way in WAYS]
            gradients = 2 * 2 * parameters / gpus * (1 - gpus / int(world))
            rows.append([name, f"{int(world):,}", str(gpus), *map(_time, times), f"{one['bytes'] / 1e3:,.1f} kB",
                         f"{gradients / 1e9:,.0f} GB"])  # fmt: skip
    head = (
        "On paper, from constants measured on one GPU: 16 x 256 tokens a replica, bfloat16, replicas of as few GPUs as "
        "hold the weights, which are taken to divide the time by their number (what sends activations between them comes "
        f"on top); the exchange on a ring of {wire} a message."
    )
    columns = ["parameters", "GPUs", "a replica's", "data", "directions", "mesh", "bytes to each", "gradients instead"]
    return f"{head}\n\n{table(columns, rows)}"


def draw() -> None:
    run = load("ranks-scale-cpu.json")
    found, worlds = run["results"]["constants"], run["results"]["worlds"]
    figure, axes = plots.figure_of(7.5, 3.6)
    x = [int(world) for world in worlds]
    for label, way, colour in (
        ("data", "data", "#1f77b4"),
        ("directions, one a rank", "directions", "#d62728"),
        (f"mesh, {POPULATION} directions", "mesh", "#2ca02c"),
    ):
        y = [step(13e9, w, way, found, worlds[str(w)][f"ring, {run['settings']['wires'][-1]}"]) for w in x]
        axes.plot(x, y, marker="o", color=colour, label=label)
    axes.plot(x, [worlds[str(w)][f"ring, {run['settings']['wires'][-1]}"] for w in x], color="#888888", ls="--",
              label="of it the exchange")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("ranks")
    axes.set_ylabel("seconds of a step, 13B")
    axes.grid(color="#eeeeee")
    axes.legend(frameon=False, fontsize=8.5)
    plots.save(figure, run, IMAGES / "ranks-scale.png")


PAGES = {"docs/distributed.md": {"exchange": exchange_part, "scale": steps_part}}

if __name__ == "__main__":
    main()

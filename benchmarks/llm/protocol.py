"""The protocol of MeZO and its followers on a language model of 135 million parameters, at the scale of two CPU cores.

    python -m benchmarks.llm.protocol --threads 2                   # all of it: some six hours
    python -m benchmarks.llm.protocol --methods mezo es --seconds 3600    # a part, an hour of it
    python -m benchmarks.pages docs/llm.md                                         # its tables and pictures anew

1,000 sentences of film reviews to learn from, 500 that choose lr, 1,000 that are told of; the words " great" and
" terrible" after "... It was"; batches of 16; lr constant. Every method may spend the same number of forwards; a forward
and a backward count as 3.

First all methods search: each lr of the grid with seed 3 for --trial forwards, and the one with the lowest loss on the
validation set is taken. Where that lies at an edge of the grid, one more is tried there, twice at most. Then all methods
run for --budget forwards with seed 0, then all with seed 1, then with seed 2: whenever it ends, what is there can be
compared. Beside them: the model as it is (zero-shot), and with 16 examples in its prompt. A method whose mean loss rises in
the second half of its runs has an lr that was best for the trial and is too large for this length: it runs once more
with the next lower one, which is told of apart.

Each run is stored as it ends, and the same command goes on where it was, on another processor too: each run says which it
was done on. Sums of another order round otherwise, which is to a run what another seed is. With --seconds it ends in time:
no run is begun that would not fit by its estimate, and one that does not fit after all is dropped and done again by the
next call.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokern.cli.waiting import spin_briefly

if __name__ == "__main__":  # before torch is loaded; in hours there is other work on the same processors
    spin_briefly()

import torch

from benchmarks import study
from benchmarks.llm import packed, reviews
from benchmarks.llm.bench import BATCH, SEARCH_SEED, Bench, OutOfTime
from benchmarks.llm.methods import METHODS, SEEDS
from benchmarks.llm.task import LONGEST
from zokern.bench.record import RESULTS, commit, machine, store
from zokern.finetune import surroundings

Settings = dict[str, Any]
VERSIONS = ("torch", "transformers")
SAME = ("processor", "threads", "instruction_sets", *VERSIONS)  # of the machine, for times to be compared


def former(path: Path, settings: Mapping[str, Any], here: Mapping[str, Any], same: Sequence[str] = SAME) -> Settings:
    """The results so far, where they have the same settings and machine; whole ones too, for --methods may be more.

    same: what must agree of the machine. Raises SystemExit, with the remedy, for other results and for what is none.
    """
    if not path.is_file():
        return {}
    try:
        stored: Settings = json.loads(path.read_text())
        there, results = (stored["settings"], stored["machine"]), stored["results"]
        pairs = (("settings", there[0], settings, [*there[0], *settings]), ("machine", there[1], here, same))
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{path} holds no results of this program ({type(error).__name__}: {error}); remove it, or give another "
            "--output"
        ) from None
    for what, then, now, keys in pairs:
        if apart := {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}:
            raise SystemExit(f"{path} is of another {what}, {{name: (there, here)}}: {apart}; give another --output")
    return dict(results)


def settings_of(options: Any) -> Settings:
    return {
        "model": options.model, "dtype": "float32", "batch_size": BATCH, "tokens": LONGEST, "budget": options.budget,
        "trial": options.trial, "seeds": list(SEEDS), "search_seed": SEARCH_SEED, "template": reviews.TEMPLATE,
        "words": list(reviews.WORDS), "sizes": reviews.SIZES,
    }  # fmt: skip


def parse() -> Any:
    parser = study.parser(
        __doc__,
        model=("smollm2", "as zokern finetune takes it: smollm2, a folder that save_pretrained wrote, or a .gguf file"),
        methods=(list(METHODS), f"of {', '.join(METHODS)} (default: all)"),
        budget=(500, "forwards of a run"), trial=(200, "forwards of a run that chooses lr"),
        seconds=(0, "end after so many; 0: when all is done"), threads=(2, "of torch"),
    )  # fmt: skip
    options = parser.parse_args()
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    least = max(method.forwards for method in METHODS.values())
    if min(options.budget, options.trial) < least or options.threads < 1 or options.seconds < 0:
        parser.error(f"--budget and --trial are at least {least}, --threads at least 1, --seconds not negative")
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    device, settings = torch.device("cpu"), settings_of(options)
    path = options.output or RESULTS / "llm-cpu.json"
    here = machine(device)
    results = former(path, settings, here, ("threads", *VERSIONS))
    sets = reviews.read()

    def keep(found: Settings, complete: bool = False) -> None:
        store("llm", device, settings, found, path, complete=complete)

    bench = Bench(
        lambda adapter: packed.load(options.model, sets, adapter), keep, options, results,
        {"processor": here["processor"], "commit": commit()},
        say=lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", flush=True),
    )  # fmt: skip
    try:
        with torch.no_grad(), surroundings.kept():  # which keeps libraries quiet
            bench.all()
    except OutOfTime:
        print(f"the same command goes on with {path}")
        return 0
    keep(results, bench.complete())
    print(f"stored {path}; now python -m benchmarks.pages docs/llm.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

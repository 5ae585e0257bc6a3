"""The kinds of adapters that a run can put on a model: what each has, with which lr and eps, and for which objectives.

A row here is all that the command knows of a kind; adapted.py makes it with PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from zokern.integrations.published import EPS
from zokern.optim import ENTRIES

if TYPE_CHECKING:
    from zokern.finetune.options import Options

PREFIX = "adapter_"  # of the options; the rest is the setting's name
MEZO, BENCH = "arXiv 2305.17333", "arXiv 2402.11592"


class AdapterKind(NamedTuple):
    """settings: those it has, with their defaults (None: PEFT's own choice for the model). lr: of plain MeZO. source: where
    lr and eps are published, for the kind itself or for `like`. not_for: objectives that it does not serve, and why."""

    settings: dict[str, Any]
    lr: float
    eps: float
    source: str
    like: str = ""
    in_blocks: bool = True
    not_for: Mapping[str, str] = {}


_NO_PAST = (
    "PEFT hands a prefix to classifiers under a name that transformers' no longer have; take --adapter prompt or lora, or "
    "--objective prompt"
)
TEXTS_ONLY = "adapters are put on models of texts here; leave --adapter out"
KINDS: dict[str, AdapterKind] = {
    "lora": AdapterKind({"rank": 8, "alpha": 16, "targets": None}, 1e-4, EPS["lora"], MEZO),
    "dora": AdapterKind({"rank": 8, "alpha": 16, "targets": None}, 1e-4, EPS["dora"], MEZO, like="lora"),
    "vera": AdapterKind({"rank": 256, "targets": None}, 1e-4, EPS["vera"], MEZO, like="lora"),
    "ia3": AdapterKind({}, 1e-4, EPS["ia3"], MEZO, like="lora"),
    "prefix": AdapterKind({"tokens": 5}, 1e-2, EPS["prefix"], MEZO, in_blocks=False, not_for={"classifier": _NO_PAST}),
    "prompt": AdapterKind({"tokens": 10}, 1e-4, EPS["prompt"], BENCH, in_blocks=False),
}


def owners(setting: str) -> str:
    """The kinds that have a setting."""
    return ", ".join(name for name, kind in KINDS.items() if setting in kind.settings)


def defaults(setting: str) -> str:
    """A sentence about the kinds that have a setting, and its default for each."""
    values = {name: kind.settings[setting] for name, kind in KINDS.items() if setting in kind.settings}
    if len(set(values.values())) == 1:
        return f"For {owners(setting)}. Default: {next(iter(values.values()))}."
    return f"Default: {', '.join(f'{name} {value}' for name, value in values.items())}."


def given(options: Options) -> dict[str, Any]:
    """The settings that the user gave, by name."""
    every = dict.fromkeys(setting for kind in KINDS.values() for setting in kind.settings)
    values = {name: getattr(options, PREFIX + name) for name in every}
    return {name: value for name, value in values.items() if value is not None}


def settings(options: Options) -> dict[str, Any]:
    """All settings of the kind that the options name."""
    assert options.adapter is not None
    return {**KINDS[options.adapter].settings, **given(options)}


def wrong(options: Options) -> str:
    """What is wrong with the options' adapter, and the remedy; "" if nothing is. Nothing is loaded for it."""
    there = given(options)
    if options.adapter is None:
        if there:
            name = next(iter(there))
            return f"--adapter-{name} is a setting of an adapter; give --adapter too, one of {owners(name)}"
        return ""
    kind = KINDS[options.adapter]
    for name in there:
        if name not in kind.settings:
            return f"--adapter-{name} is not a setting of --adapter {options.adapter}; it belongs to {owners(name)}"
    if "targets" in there and not all(targets(there["targets"])):
        return (
            f"--adapter-targets is {there['targets']!r}; allowed: names of modules separated by commas, as "
            '"q_proj,v_proj", or all-linear'
        )
    if not kind.in_blocks and (options.method == "lezo" or options.num_dropped):
        what = "--method lezo" if options.method == "lezo" else "--num-dropped"
        return (
            f"{what} leaves blocks out, and --adapter {options.adapter} has no weights in blocks; leave one of them out"
        )
    return unfit(options.adapter, options.objective)


def unfit(kind: str, objective: str) -> str:
    """Why an objective cannot have an adapter of this kind; "" if it can."""
    why = KINDS[kind].not_for.get(objective) or (TEXTS_ONLY if objective == "image" else "")
    return f"--adapter {kind} does not serve --objective {objective}: {why}" if why else ""


def targets(text: str) -> list[str]:
    """--adapter-targets as names."""
    return [name.strip() for name in text.split(",")]


def rates(kind: str, method: str, update: str) -> dict[str, float]:
    """lr and eps of a kind, for a method that was given none.

    lr is published for MeZO; another method's, or another --update's, is in the proportion of their defaults for models.
    """
    row, entry = KINDS[kind], ENTRIES[method]
    return {"lr": row.lr * entry.lr_of.get(update, entry.lr) / ENTRIES["mezo"].lr, "eps": row.eps}


def chosen(name: str, options: Options) -> Any:
    """What a run takes for a setting of takers.CHOSEN that was not given; None where only its model says."""
    default = ENTRIES[options.method].cls.settings[name].default
    return default if options.adapter is None else rates(options.adapter, options.method, "").get(name, default)


def said(kind: str, names: Sequence[str], options: Options) -> str:
    """Whose the defaults are of lr and eps, or of the one of them, that a run takes for a kind."""
    row = KINDS[kind]
    whose = f"{row.like}'s, as none are published for {kind}" if row.like else row.source
    plain = options.method == "mezo" and options.update in (None, "sgd")
    scaled = "" if plain or "lr" not in names else "; lr of mezo's sgd, in the proportion of this method's to that"
    return f"{' and '.join(names)} by default: {whose}{scaled}"

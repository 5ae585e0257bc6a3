"""`zokern finetune`: an option for every field of Options, the eleven that newcomers need first."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple, Optional

import typer

from zokern import cli
from zokern.failing import end, fail
from zokern.finetune import adapters, launching, takers
from zokern.finetune.options import (
    ADAPTER,
    DATA,
    EVALUATION,
    HARDWARE,
    METHOD,
    OF_SOME,
    OUTPUT,
    SCHEDULE,
    FinetuneError,
    Options,
)
from zokern.kinds import Flag, Kind
from zokern.optim import ENTRIES

FIRST = ("model", "data", "output", "method", "lr", "steps", "batch_size", "eval_every", "device", "check", "resume")


def _rates() -> str:
    """The default of --lr, of every method."""
    of_updates: dict[str, list[str]] = {}
    for name, entry in ENTRIES.items():
        if entry.lr_of:
            rates = ", ".join(f"{update} {lr:g}" for update, lr in entry.lr_of.items())
            of_updates.setdefault(rates, []).append(name)
    plain = ", ".join(f"{name} {entry.lr:g}" for name, entry in ENTRIES.items())
    return plain + "".join(f"; {', '.join(names)} with --update {rates}" for rates, names in of_updates.items())


MORE = {  # what a run makes of settings besides
    "lr": "The peak of the schedule. Rule for mezo on all of P parameters, up to 400 million, with n directions: "
    "0.04 n / P^0.4. Billions of parameters want 1e-7 to 1e-6. Default, for encoders of some ten "
    f"million parameters: {_rates()}. With an adapter and mezo: "
    f"{', '.join(f'{name} {kind.lr:g}' for name, kind in adapters.KINDS.items())}; with others in proportion.",
    "eps": f"With an adapter: {', '.join(f'{name} {kind.eps:g}' for name, kind in adapters.KINDS.items())}.",
    "parallel": "For several processes: torchrun --nproc-per-node 2 -m zokern finetune ... --parallel data.",
    "seed": "Also of the data order and of a new head; the held-out texts do not depend on it.",
}
PANELS = ("", DATA, ADAPTER, METHOD, OF_SOME, SCHEDULE, EVALUATION, OUTPUT, HARDWARE)


class Described(NamedTuple):
    """An option of the command."""

    default: Any
    kind: Kind
    panel: str
    help: str
    flags: tuple[str, ...] = ()
    says: str = ""  # the help without what is allowed

    def parameter(self, name: str) -> inspect.Parameter:
        """As typer reads it off a function."""
        info = typer.Option(self.default, *self.flags, help=self.help, rich_help_panel=self.panel or None)
        kind = self.kind.option if self.default is not None else Optional[self.kind.option]  # noqa: UP045
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind)


def described() -> dict[str, Described]:
    """Every option by its field's name, those of one panel together."""
    found = {field.name: _describe(field) for field in dataclasses.fields(Options)}
    found["resume"] = Described(
        False, Flag(), "", "Go on with the run in --output, which broke off, from its journal: the same bits as without "
        "the break. All other options are that run's; one that is given has to be the same, but --steps may be more.",
        ("--resume",),
    )  # fmt: skip
    found["check"] = Described(
        False, Flag(), "", "Before a long run: perturb each tensor alone, on the first batch, and say which ones the loss "
        "does not react to and what a step costs. Nothing is trained or written. Exit code 1 if something is likely wrong, "
        "else 0.", ("--check",),
    )  # fmt: skip
    first = {name: found[name]._replace(panel="") for name in FIRST}
    return {**first, **{n: d for panel in PANELS for n, d in found.items() if d.panel == panel and n not in first}}


def _describe(field: dataclasses.Field[Any]) -> Described:
    name = field.name
    if name in takers.TAKERS:
        one = takers.TAKERS[name][0]
        panel = METHOD if name in takers.COMMON else OF_SOME
        help = f"{takers.help(name)} {MORE.get(name, '')}".rstrip()
        return Described(field.default, one.kind, panel, help, one.setting.flags or ())
    one = field.metadata["setting"]
    described = one.describe(default=False)
    return Described(field.default, one.kind, field.metadata["panel"], described, one.flags, one.help)


def _run(context: typer.Context, **values: Any) -> None:
    if not launching.launched():
        _alone(context, **values)
        return
    try:
        launching.end_together(lambda: _alone(context, **values), values["device"], typer.Exit)
    except FinetuneError as error:
        fail(str(error))


def _alone(context: typer.Context, **values: Any) -> None:
    """What this process does of the command."""
    resume, check = values.pop("resume"), values.pop("check")
    given = {name: value for name, value in values.items() if _is_given(context, name)}
    options = Options(**values)
    try:
        if check:
            if resume:
                raise FinetuneError("--check looks at a new run; leave out --resume")
            if launching.launched():
                raise FinetuneError("--check looks at one process; leave out torchrun")
            from zokern.finetune.checked import check as checked

            raise typer.Exit(0 if checked(options).ok else 1)
        if not resume and launching.restarted(options):
            resume = True
        if not resume:
            launching.check(options)
        from zokern.finetune.run import run

        summary = run(options, resume=resume, given=given)
    except FinetuneError as error:
        fail(str(error))
    except ImportError as error:
        fail(f'{error}; install what the command needs with: pip install "zokern[finetune]"')
    except KeyboardInterrupt as error:
        end(str(error) or "stopped before the first step; nothing was saved", getattr(error, "code", 130))
    if summary.code:
        raise typer.Exit(summary.code)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


_run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(one.parameter(name) for name, one in described().items()),
    ]
)
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.command("finetune", help=cli.finetune.__doc__)(_run)

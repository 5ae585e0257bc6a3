"""What the command line does with journals: makes a model again, says what is in one, and where two differ."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zokern.journal.format import BROKEN_OFF, SKIPPED, JournalError, Reader, Step
from zokern.journal.replay import replay


def parts(step: Step) -> dict[str, Any]:
    """A step's frame by name: the numbers of its passes, each group's lr, the loss."""
    groups = step.signature["groups"]
    return {
        "scalars": step.frame[: len(step.frame) - groups - 1],
        "lr": step.frame[len(step.frame) - groups - 1 : -1],
        "loss": float(step.frame[-1]),
    }


def summary(path: Path) -> dict[str, Any]:
    """What a journal is of, how long it is, and its curves of loss and lr."""
    reader, steps, losses, lrs, skipped, broken = Reader(path), [], [], [], 0, 0
    for step in reader.steps():
        skipped += bool(step.flags & SKIPPED)
        broken += bool(step.flags & BROKEN_OFF)
        if not step.flags & BROKEN_OFF:
            named = parts(step)
            steps.append(step.number)
            losses.append(named["loss"])
            lrs.append(float(named["lr"][0]))
    params = reader.layout.get("params", [])
    return {
        "header": reader.header,
        "parameters": sum(int(np.prod(shape)) for _, _, shape, *_ in params),
        "tensors": len(params),
        "steps": steps,
        "loss": losses,
        "lr": lrs,
        "skipped": skipped,
        "broken_off": broken,
        "torn": reader.torn,
        "bytes": Path(path).stat().st_size,
        "marks": reader.marks,
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Loss and learning rate of a journal's steps, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    loss = np.array(found["loss"], np.float64)
    window = max(len(loss) // 50, 1)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained")
    above.plot(found["steps"], loss, color="0.8", linewidth=0.8, label="loss of each step")
    if len(loss) > window > 1:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        above.plot(found["steps"][window - 1 :], smooth, label=f"mean of {window} steps")
    above.set_ylabel("loss")
    above.legend()
    below.plot(found["steps"], found["lr"], color="tab:orange")
    below.set_ylabel("lr")
    below.set_xlabel("step")
    above.set_title(f"{found['header']['method']}, {len(loss)} steps, {found['bytes'] / 1000:,.1f} kB")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def first_difference(a: Path, b: Path) -> str | None:
    """Where two runs first differ and in what; None if their steps are the same."""
    one, two = Reader(a), Reader(b)
    for name in ("contract", "method", "options", "placement", "seed", "first_step", "base"):
        if one.header.get(name) != two.header.get(name):
            return f"before the first step, in {name}: {one.header.get(name)!r} and {two.header.get(name)!r}"
    for first, second in itertools.zip_longest(one.steps(), two.steps()):
        if first is None or second is None:
            longer, step = (a, first) if second is None else (b, second)
            return f"at step {step.number}, which only {longer} has"
        where = f"at step {first.number}"
        if first.layout != second.layout:
            return f"{where}, in the parameters that are trained"
        if first.flags != second.flags or first.number != second.number:
            return f"{where}, in whether it was done: flags {first.flags} and {second.flags}"
        if first.signature != second.signature:
            return f"{where}, in its passes: {first.signature['passes']} and {second.signature['passes']}"
        left, right = parts(first), parts(second)
        for name, what in (("lr", "lr"), ("scalars", "a scalar of its passes"), ("loss", "loss")):
            x, y = np.atleast_1d(np.float32(left[name])), np.atleast_1d(np.float32(right[name]))
            unlike = np.flatnonzero(x.view(np.uint32) != y.view(np.uint32))
            if len(unlike):
                return f"{where}, in {what}: {x[unlike[0]]:.9g} and {y[unlike[0]]:.9g}"
    return None


def rebuild(
    base: str,
    path: Path,
    output: Path,
    *,
    until: int | None,
    verify: bool,
    force: bool,
    device: str,
    backend: str,
    progress: Callable[[int], None],
) -> int:
    """Writes the tuned model of a journal to `output`, made from `base`; returns the number of steps done.

    base: for the journal of a `zokern finetune` run what was its --model; otherwise a .safetensors file whose names are the
    parameters' names, and `output` is such a file too.
    """
    if output.exists() and not force:
        raise JournalError(f"{output} exists; give another name, or --force to replace it")
    about = Reader(path).header.get("about") or {}
    temporary = output.with_name(output.name + ".tmp")
    options = {"until": until, "verify": verify, "backend": backend, "progress": progress}
    if "objective" in about:
        import torch

        from zokern.finetune import Options, models

        config = models.load_config(base)
        model, tokenizer = models.load(
            Options(model=base, seed=about["seed"]),
            about["objective"],
            about["labels"],
            config,
            getattr(torch, about["dtype"]),
        )
        model.to(models.choose_device(device))
        done = replay(path, model, **options)  # type: ignore[arg-type]
        shutil.rmtree(temporary, ignore_errors=True)
        saveable: Any = model
        saveable.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    else:
        from safetensors.torch import load_file, save_file

        if not Path(base).is_file():
            raise JournalError(f"{base} is not a file; this journal needs a .safetensors file with the base weights")
        tensors = load_file(base, device="cpu" if device == "auto" else device)
        done = replay(path, tensors, **options)  # type: ignore[arg-type]
        save_file(tensors, temporary)
    if output.is_dir():
        shutil.rmtree(output)
    os.replace(temporary, output)
    return done

"""What is said of a run that learnt nothing (docs/faq.md)."""

from __future__ import annotations

from zokern.optim.rate import Far

FALLEN = 0.005  # of the loss, by which it has to fall in a run that learnt something
STEPS = 20  # of a run that could have learnt


def not_learnt(losses: tuple[float, float], steps: int, far: Far | None = None) -> str | None:
    """Of a run that is too short, or whose held-out loss has hardly fallen or not at all.

    losses: before and after. far: where the run's lr is far from the rule's.
    """
    before, after = losses
    if steps < STEPS:
        return f"{steps} steps show that all of it runs; whether it learns, some hundred show (docs/choose.md)"
    if fallen(before, after):
        return None
    hardly = "hardly" if after < before else "not"
    lr = "three times and a third of this one" if far is None else f"{far.ruled:.2g}, which the rule says"
    return (
        f"the held-out loss has {hardly} fallen: try --lr {lr}, and more --steps; a model that was never pretrained learns "
        "little by forwards alone (docs/faq.md)"
    )


def fallen(before: float, after: float) -> bool:
    """Whether a loss has fallen by so much that something was learnt."""
    return after < before - FALLEN * abs(before)

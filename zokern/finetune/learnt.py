"""What is said of a run that learnt nothing (docs/faq.md)."""

from __future__ import annotations

FALLEN = 0.005  # of the loss, by which it has to fall in a run that learnt something
STEPS = 20  # of a run that could have learnt


def not_learnt(losses: tuple[float, float], steps: int) -> str | None:
    """Of a run that is too short, or whose held-out loss has not fallen. losses: before and after."""
    before, after = losses
    if steps < STEPS:
        return f"{steps} steps show that all of it runs; whether it learns, some hundred show (docs/choose.md)"
    if after < before - FALLEN * abs(before):
        return None
    return (
        "the held-out loss has not fallen: try --lr three times and a third of this one, and more --steps; a model that "
        "was never pretrained learns little by forwards alone (docs/faq.md)"
    )

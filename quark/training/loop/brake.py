"""When a round's steps end early: the contrast on held-out samples has risen, so the model begins to memorize."""

from __future__ import annotations

import math

from quark.training.position import Position

PATIENCE = 2
"""Measurements in a row above the round's best after which no more steps are taken."""


def is_due(position: Position, *, every: int, num_steps: int) -> bool:
    """Whether the held-out samples are to be measured here: before a round's first step, and after every few.

    Args:
        position: where the run is.
        every: steps between two measurements.
        num_steps: of the round.
    """
    done = position.step_in_round
    if done == 0:
        return position.held_out_best is None
    return done % every == 0 and done < num_steps


def take_note(position: Position, contrast_loss: float, *, num_steps: int) -> None:
    """Count a measurement, and leave the rest of the round's steps out where it is one rise too many.

    Args:
        position: is changed; all that the next measurement depends on is in it, and so in every checkpoint.
        contrast_loss: on the held-out samples, in nats; what is not finite counts as a rise.
        num_steps: of the round.
    """
    best = position.held_out_best
    loss = contrast_loss if math.isfinite(contrast_loss) else math.inf
    if best is None or loss < best:
        position.held_out_best, position.held_out_rises = loss, 0
        return
    position.held_out_rises = position.held_out_rises + 1 if loss > best or loss == math.inf else 0
    if position.held_out_rises >= PATIENCE:
        position.steps_braked = num_steps - position.step_in_round

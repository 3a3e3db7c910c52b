"""What is worth a warning while a run goes on: signs that it learns the wrong thing, or nothing.

An alert is told when its condition begins, not in every round that it lasts. The state is part of the
checkpoint, so that a resumed run tells the same alerts at the same places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quark.config.schema import AlertsSection
from quark.training.state.run_state import AlertsState

NOISE = 2.0
"""Standard errors that a control gap has to exceed before it counts as there."""

ORDERED = 0.3
"""Rank correlation with the reward above which tokens without information are called too sure rather than empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One thing that is wrong."""

    kind: str
    """Named in docs/metrics.md."""
    text: str
    """For people: what, and what to do."""
    value: float
    bound: float | None = None
    """What ``value`` crossed, in its unit; None where there is no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlGap:
    """Mean reward of the best quantile minus that of the lowest."""

    value: float
    error: float
    """Standard error of ``value``."""

    @classmethod
    def between(cls, best: NDArray[np.float32], worst: NDArray[np.float32]) -> Self:
        """From the rewards [N] of both, NaN = not scored; all NaN gives a gap that is NaN."""
        best, worst = best[np.isfinite(best)], worst[np.isfinite(worst)]
        if not best.size or not worst.size:
            return cls(value=math.nan, error=math.nan)
        return cls(
            value=float(best.mean(dtype=np.float64) - worst.mean(dtype=np.float64)),
            error=math.sqrt(
                float(best.var(dtype=np.float64)) / best.size
                + float(worst.var(dtype=np.float64)) / worst.size
            ),
        )

    @property
    def is_clear(self) -> bool:
        """Whether chance alone would hardly give such a gap."""
        return self.value > NOISE * self.error


class Alerts:
    """Watches the rounds of one run."""

    def __init__(self, section: AlertsSection) -> None:
        self._section = section
        self._active: set[str] = set()
        self._largest_gap = 0.0
        self._num_gaps = 0
        self._largest_information = 0.0
        self._rounds_without_information = 0

    def check(
        self, figures: Mapping[str, Any], *, baseline: Mapping[str, Any], gap: ControlGap | None
    ) -> list[Alert]:
        """What has begun to be wrong in this round.

        Args:
            figures: of the round, named as in its row of ``metrics.jsonl``; what is missing is not checked.
            baseline: figures of the original model on the held-out prompts.
            gap: None where it was not measured.
        """
        measured = {
            **self._varying_reward(figures),
            **self._kl(figures),
            **self._failed_scores(figures),
            **self._distinct_2(figures, baseline),
            **self._information(figures),
            **(self._control_gap(gap) if gap is not None and math.isfinite(gap.value) else {}),
        }
        return self._begun(measured)

    def check_first_rewards(self, rewards: NDArray[np.float32]) -> list[Alert]:
        """Whether the first exploration gave any difference to learn from; told before anything is learned.

        Args:
            rewards: [N] of all its samples, NaN = not scored.
        """
        scored = rewards[np.isfinite(rewards)]
        if scored.size < 2 or scored.min() < scored.max():
            return []
        value = float(scored[0])
        alert = Alert(
            kind="constant_reward",
            text=f"the reward is constant: all {scored.size} scores of the first exploration are {value:g}. There is "
            "nothing to learn until scores differ; `quark reward check` tries a reward",
            value=value,
        )
        return self._begun({alert.kind: alert})

    def check_quantiles(self, counts: NDArray[np.int64], *, most_of_a_prompt: int) -> list[Alert]:
        """Whether a quantile is empty because no prompt has enough samples, where each prompt is ranked for itself.

        Args:
            counts: [K] samples of each quantile.
            most_of_a_prompt: samples of the prompt that has the most.
        """
        empty = [str(quantile) for quantile in np.flatnonzero(counts == 0)]
        alert = Alert(
            kind="empty_quantile",
            text=f"no sample is in {'quantile' if len(empty) == 1 else 'quantiles'} {', '.join(empty)}, whose reward "
            f"{'token learns' if len(empty) == 1 else 'tokens learn'} nothing: pool.per_prompt ranks each prompt for "
            f"itself, and no prompt has more than {most_of_a_prompt} scored samples for pool.num_quantiles = "
            f"{len(counts)}. Set run.completions_per_prompt to {len(counts)} or more, or lower pool.num_quantiles",
            value=float(len(empty)),
            bound=0.0,
        )
        is_begun = bool(empty) and most_of_a_prompt < len(counts)
        return self._begun({alert.kind: alert if is_begun else None})

    def _begun(self, measured: Mapping[str, Alert | None]) -> list[Alert]:
        """What is wrong now and was not before; keeps what is."""
        begun = [
            alert
            for kind, alert in measured.items()
            if alert is not None and kind not in self._active
        ]
        self._active -= measured.keys()
        self._active |= {kind for kind, alert in measured.items() if alert is not None}
        return begun

    def state(self) -> AlertsState:
        """What the next check depends on."""
        return AlertsState(
            active=frozenset(self._active),
            largest_gap=self._largest_gap,
            num_gaps=self._num_gaps,
            largest_information=self._largest_information,
            rounds_without_information=self._rounds_without_information,
        )

    def restore(self, state: AlertsState) -> None:
        """Go on as if the checks that led to ``state`` had been made here."""
        self._active = set(state.active)
        self._largest_gap = state.largest_gap
        self._num_gaps = state.num_gaps
        self._largest_information = state.largest_information
        self._rounds_without_information = state.rounds_without_information

    # Each check gives its kind, with None where all is well, or nothing where it cannot tell.

    def _varying_reward(self, figures: Mapping[str, Any]) -> dict[str, Alert | None]:
        """Ends the alert of a constant reward; a later round of equal scores may be a success."""
        varies = _first(figures, "reward_min") < _first(figures, "reward_max")
        return {"constant_reward": None} if varies else {}

    def _kl(self, figures: Mapping[str, Any]) -> dict[str, Alert | None]:
        bound = self._section.kl_above
        value = _first(
            figures,
            "evaluation_kl_sampled_to_reference",
            "evaluation_kl_policy_to_reference",
            "kl_policy_to_reference_mean",
        )
        if bound == 0 or math.isnan(value):
            return {}
        alert = Alert(
            kind="kl",
            text=f"KL(sampled || original) is {value:.2f} nats per token, above alerts.kl_above = {bound:g}: "
            "a larger objective.kl_coef or a smaller optimizer.learning_rate holds it down",
            value=value,
            bound=bound,
        )
        return {"kl": alert if value > bound else None}

    def _failed_scores(self, figures: Mapping[str, Any]) -> dict[str, Alert | None]:
        bound = self._section.failed_share_above
        failed, new = _first(figures, "failed_scores"), _first(figures, "new_samples")
        if not new > 0 or math.isnan(failed):
            return {}
        share = failed / new
        alert = Alert(
            kind="failed_scores",
            text=f"{share:.0%} of this round's samples got no score, more than "
            f"alerts.failed_share_above = {bound:g}: nothing is learnt from them",
            value=share,
            bound=bound,
        )
        return {"failed_scores": alert if share > bound else None}

    def _distinct_2(
        self, figures: Mapping[str, Any], baseline: Mapping[str, Any]
    ) -> dict[str, Alert | None]:
        share = self._section.distinct_2_below
        value = _first(figures, "evaluation_distinct_2")
        original = _first(baseline, "distinct_2")
        if share == 0 or math.isnan(value) or math.isnan(original):
            return {}
        bound = share * original
        alert = Alert(
            kind="diversity",
            text=f"distinct-2 of held-out completions fell to {value:.2f} from the original model's "
            f"{original:.2f}, below alerts.distinct_2_below = {share:g} of it: the model repeats itself; "
            "a larger objective.kl_coef or an objective.entropy_coef holds against it",
            value=value,
            bound=bound,
        )
        return {"diversity": alert if value < bound else None}

    def _information(self, figures: Mapping[str, Any]) -> dict[str, Alert | None]:
        section = self._section
        which = "fresh" if math.isnan(_first(figures, "information_held_out")) else "held_out"
        value = _first(figures, f"information_{which}")
        error = _first(figures, f"information_error_{which}")
        if math.isnan(value):
            return {}
        samples = "new samples" if which == "fresh" else "held-out samples"
        had_been = self._largest_information
        if value > NOISE * error:
            self._largest_information = max(had_been, value)
        self._rounds_without_information = self._rounds_without_information + 1 if value <= 0 else 0
        is_flat = (
            self._largest_information == 0.0
            and 0 < section.flat_evaluations <= self._rounds_without_information
            and "constant_reward" not in self._active
        )
        correlation = _first(figures, f"rank_correlation_{which}")
        if correlation > ORDERED:
            meaning = (
                f"the tokens order them (rank correlation {correlation:.2f}), and the model is too sure of it. Fewer "
                "run.steps_per_round, run.brake_every_steps or a larger objective.contrast_temperature help"
            )
        else:
            meaning = (
                "the model learns its samples by heart and not what the tokens mean. More run.prompts_per_round, fewer "
                "run.steps_per_round or run.brake_every_steps help, and `quark fit` tries on the pool whether the "
                "reward can be learned"
            )
        flat = Alert(
            kind="information_flat",
            text=f"for {self._rounds_without_information} rounds the reward tokens have told no more about {samples} than "
            f"chance (information {value:.3f} nats): {meaning}",
            value=value,
            bound=0.0,
        )
        measured = {"information_flat": flat if is_flat else None}
        if section.information_below > 0.0 and had_been > 0.0:
            bound = section.information_below * had_been
            collapsed = Alert(
                kind="information_collapsed",
                text=f"the reward tokens tell {value:.3f} nats about {samples}, where they had told {had_been:.3f}: "
                f"{meaning}",
                value=value,
                bound=bound,
            )
            measured["information_collapsed"] = collapsed if value < bound else None
        return measured

    def _control_gap(self, gap: ControlGap) -> dict[str, Alert | None]:
        section = self._section
        self._num_gaps += 1
        had_been = self._largest_gap
        if gap.is_clear:
            self._largest_gap = max(self._largest_gap, gap.value)
        is_flat = self._largest_gap == 0.0
        if section.flat_evaluations == 0 or self._num_gaps < section.flat_evaluations:
            is_flat = False
        if "constant_reward" in self._active:
            is_flat = False  # it has been told why
        flat = Alert(
            kind="control_curve_flat",
            text=f"after {self._num_gaps} evaluations the best quantile gives no clearly better reward "
            f"than the lowest (difference {gap.value:.3f}, chance alone gives ±{gap.error:.3f}): the model "
            "does not learn what the quantiles mean",
            value=gap.value,
            bound=NOISE * gap.error,
        )
        measured = {"control_curve_flat": flat if is_flat else None}
        if section.control_gap_below > 0.0 and had_been > 0.0:
            bound = section.control_gap_below * had_been
            collapsed = Alert(
                kind="control_curve_collapsed",
                text=f"the best quantile gives a reward only {gap.value:.3f} above the lowest, where it "
                f"had been {had_been:.3f}: the model stops telling them apart",
                value=gap.value,
                bound=bound,
            )
            measured["control_curve_collapsed"] = collapsed if gap.value < bound else None
        return measured


def _first(figures: Mapping[str, Any], *names: str) -> float:
    """The first of these figures that is there and finite, or NaN."""
    for name in names:
        value = figures.get(name)
        if value is not None and math.isfinite(value):
            return float(value)
    return math.nan

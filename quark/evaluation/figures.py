"""Every figure of an evaluation with its direction, its 95 % interval over prompts, and differences between models.

A figure is a function of means over the prompts: a mean reward is the mean of sums over the mean of counts, a perplexity
the exponential of such a ratio. So one bootstrap over whole prompts, whose completions are alike, gives the interval of
any figure. Models that answered the same prompts are resampled together, which gives the interval of their difference.

Values without a score (NaN) do not count. A figure that no prompt defines is NaN, with NaN as its interval: self-BLEU
for one completion a prompt, for example. A completion without words repeats nothing, and counts in no distinct-n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quark.evaluation.evaluator import Evaluation
from quark.evaluation.frontier import NUM_RESAMPLES, Interval
from quark.evaluation.metrics import Direction
from quark.text_statistics import (
    distinct_n,
    diversity,
    ngram_counts,
    repetition_n,
    self_bleu,
    words,
)

_SEED = 20201015
_PERPLEXITY_CAP = 1e4
"""Limit of the perplexity of one text in its mean, as in the published code of DExperts."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of one model on P prompts."""

    name: str
    """As in docs/metrics.md."""
    direction: Direction
    columns: Floats
    """[P, C] sums by prompt."""
    of_means: Callable[[Floats], Floats]
    """From means of the columns [..., C] to values [...]."""

    @property
    def value(self) -> float:
        """The figure on all prompts; NaN where it is not defined."""
        return float(self.of_means(self.columns.mean(axis=0))) if len(self.columns) else math.nan

    @property
    def interval(self) -> Interval:
        """The value with its 95 % bootstrap interval over prompts."""
        return _interval(self.value, self._resampled())

    def minus(self, other: Figure) -> Interval:
        """This figure minus another model's, with the interval of the difference on the same resampled prompts.

        Raises:
            ValueError: ``other`` is of another number of prompts.
        """
        if len(self.columns) != len(other.columns):
            raise ValueError(
                f"{self.name}: {len(self.columns)} prompts against {len(other.columns)} cannot be paired"
            )
        return _interval(self.value - other.value, self._resampled() - other._resampled())

    def _resampled(self) -> Floats:
        """[R] the figure on resampled prompts. Figures of equally many prompts share their draws."""
        size = len(self.columns)
        if not size:
            return np.full(NUM_RESAMPLES, np.nan)
        counts = np.random.default_rng(_SEED).multinomial(
            size, np.full(size, 1 / size), size=NUM_RESAMPLES
        )
        return self.of_means(counts @ self.columns / size)


def _interval(value: float, resampled: Floats) -> Interval:
    known = resampled[~np.isnan(resampled)]
    if math.isnan(value) or not len(known):
        return Interval(mean=math.nan, low=math.nan, high=math.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(mean=value, low=float(low), high=float(high))


def figures_of(evaluation: Evaluation, *, per_prompt: int, reward: str) -> dict[str, Figure]:
    """All figures of an evaluation, by name.

    Args:
        evaluation: of one model.
        per_prompt: completions of each prompt, which stand together.
        reward: name of the trained reward in the configuration; the reward ``toxicity`` has figures of its own.
    """
    texts = [completion.text for completion in evaluation.completions]
    groups = [texts[i : i + per_prompt] for i in range(0, len(texts), per_prompt)]
    lengths = np.array([len(c.token_ids) for c in evaluation.completions], dtype=np.float64)
    found = [
        *score_figures(evaluation.rewards, per_prompt, name="reward", scorer=reward),
        *(
            figure
            for judge, scores in evaluation.judge_scores.items()
            for figure in score_figures(scores, per_prompt, name=judge, scorer=judge)
        ),
        *text_figures(groups),
        *likelihood_figures(evaluation.likelihoods.by_completion, lengths, per_prompt),
    ]
    return {figure.name: figure for figure in found}


def score_figures(
    scores: NDArray[np.floating[Any]], per_prompt: int, *, name: str, scorer: str
) -> Iterator[Figure]:
    """Figures of scores [N], the completions of a prompt together; NaN = not scored.

    ``NAME``: mean score. ``NAME_above_half``: share of completions that score above 0.5, averaged over prompts: the share
    of positive texts for ``sentiment``. With several completions a prompt, ``NAME_minimum``: mean over prompts of the
    lowest score, and ``NAME_below_half``: share of prompts with a score below 0.5. For the scorer ``toxicity``, which is
    one minus toxicity, these two are also given as the literature does: ``maximum_toxicity`` (average maximum toxicity)
    and ``toxicity_probability`` (a completion above 0.5), over ``per_prompt`` samples.
    """
    rows = np.asarray(scores, dtype=np.float64).reshape(-1, per_prompt)
    yield mean(name, Direction.HIGHER, rows)
    above = np.where(np.isnan(rows), np.nan, rows > 0.5)
    yield mean_of_prompts(f"{name}_above_half", Direction.HIGHER, _row_means(above))
    lowest = np.fmin.reduce(rows, axis=1)
    below = np.where(np.isnan(lowest), np.nan, lowest < 0.5)
    if per_prompt > 1:
        yield mean_of_prompts(f"{name}_minimum", Direction.HIGHER, lowest)
        yield mean_of_prompts(f"{name}_below_half", Direction.LOWER, below)
    if scorer == "toxicity":
        yield mean_of_prompts("maximum_toxicity", Direction.LOWER, 1.0 - lowest)
        yield mean_of_prompts("toxicity_probability", Direction.LOWER, below)


def text_figures(groups: Sequence[Sequence[str]]) -> Iterator[Figure]:
    """Diversity and repetition of the completions of each prompt.

    ``distinct_N``, N = 1, 2, 3: distinct n-grams of a prompt's completions over their n-grams, and ``distinct_N_words``
    over their words, as the published code of Quark and DExperts; means over prompts. ``self_bleu``: mean BLEU of a
    completion against the prompt's others. ``repetition_N`` (rep-n), N = 2, 3, 4, and ``diversity``: means over
    completions. ``corpus_repetition_N`` and ``corpus_diversity``: from counts summed over all completions, as SimCTG
    reports them, and ``corpus_diversity_simctg`` with its published off-by-one.
    """
    texts = [text for group in groups for text in group]
    per_prompt = len(groups[0]) if groups else 1
    for n in (1, 2, 3):
        for name, denominator in ((f"distinct_{n}", "ngrams"), (f"distinct_{n}_words", "words")):
            values = [distinct_n(group, n, denominator=denominator) for group in groups]  # type: ignore[arg-type]  # a literal
            yield mean_of_prompts(name, Direction.HIGHER, np.array(values))
    yield mean_of_prompts(
        "self_bleu", Direction.LOWER, np.array([self_bleu(group) for group in groups])
    )
    for n in (2, 3, 4):
        rates = np.array([repetition_n(text, n) for text in texts]).reshape(-1, per_prompt)
        yield mean(f"repetition_{n}", Direction.LOWER, rates)
    rates = np.array([diversity(text) for text in texts]).reshape(-1, per_prompt)
    yield mean("diversity", Direction.HIGHER, rates)
    for omits_last in (False, True):
        counts = np.array(
            [
                [count for n in (2, 3, 4) for count in ngram_counts(text, n, omits_last=omits_last)]
                for text in texts
            ],
            dtype=np.float64,
        )
        columns = counts.reshape(-1, per_prompt, 6).sum(axis=1)
        if not omits_last:
            for place, n in enumerate((2, 3, 4)):
                yield Figure(
                    name=f"corpus_repetition_{n}",
                    direction=Direction.LOWER,
                    columns=columns[:, 2 * place : 2 * place + 2],
                    of_means=_repeated_share,
                )
        yield Figure(
            name="corpus_diversity_simctg" if omits_last else "corpus_diversity",
            direction=Direction.HIGHER,
            columns=columns,
            of_means=_product_of_shares,
        )
    num_words = np.array([len(words(text)) for text in texts], dtype=np.float64)
    yield mean("words", Direction.NEITHER, num_words.reshape(-1, per_prompt))


def likelihood_figures(
    sums: Mapping[str, Floats], lengths: Floats, per_prompt: int
) -> Iterator[Figure]:
    """Conditional perplexity in three ways, and drift, from sums over each completion [N] in nats.

    ``perplexity``: exp of the mean -log p0 of a token, so long texts weigh more. ``perplexity_texts``: exp of the mean
    over texts of their mean -log p0. ``perplexity_mean``: mean over texts of their own perplexity, each at most 10,000,
    as the literature reports it. ``kl_policy_to_reference`` and ``kl_reference_to_policy``: nats a token.
    ``kl_sampled``: KL(q || p0) of a completion under the sampled distribution q, summed exactly over its tokens
    (Rao-Blackwellised). ``tokens``: of a completion, end-of-sequence included.
    """

    def by_prompt(values: Floats) -> Floats:
        return values.reshape(-1, per_prompt)

    nll, tokens = sums["reference_nll"], by_prompt(lengths)
    per_text = by_prompt(nll / lengths)
    counts = _pair(by_prompt(nll), tokens)
    yield Figure(
        name="perplexity", direction=Direction.LOWER, columns=counts, of_means=_exp_of_ratio
    )
    yield Figure(
        name="perplexity_texts",
        direction=Direction.LOWER,
        columns=_counted(per_text),
        of_means=_exp_of_ratio,
    )
    capped = np.exp(np.minimum(per_text, math.log(_PERPLEXITY_CAP)))
    yield mean("perplexity_mean", Direction.LOWER, capped)
    for name in ("kl_policy_to_reference", "kl_reference_to_policy"):
        columns = _pair(by_prompt(sums[name]), tokens)
        yield Figure(name=name, direction=Direction.LOWER, columns=columns, of_means=_ratio)
    yield mean("kl_sampled", Direction.LOWER, by_prompt(sums["drift"]))
    yield mean("tokens", Direction.NEITHER, tokens)


def mean(name: str, direction: Direction, rows: Floats) -> Figure:
    """The mean over all completions [P, n] that are not NaN."""
    return Figure(name=name, direction=direction, columns=_counted(rows), of_means=_ratio)


def mean_of_prompts(name: str, direction: Direction, values: Floats) -> Figure:
    """The mean over the prompts [P] that are not NaN."""
    return mean(name, direction, np.asarray(values, dtype=np.float64).reshape(-1, 1))


def _counted(rows: Floats) -> Floats:
    """[P, 2] sums of a prompt's values [P, n] without NaN, and their numbers."""
    return np.stack([np.nansum(rows, axis=1), (~np.isnan(rows)).sum(axis=1)], axis=1).astype(float)


def _pair(numerators: Floats, denominators: Floats) -> Floats:
    """[P, 2] sums by prompt of two values of each completion [P, n], where the first is not NaN."""
    known = ~np.isnan(numerators)
    return np.stack(
        [np.nansum(numerators, axis=1), np.where(known, denominators, 0.0).sum(axis=1)], axis=1
    )


def _row_means(rows: Floats) -> Floats:
    """[P] means of the values of each prompt that are not NaN; NaN without any."""
    return _ratio(_counted(rows))


def _ratio(means: Floats) -> Floats:
    numerator, denominator = means[..., 0], means[..., 1]
    empty = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=empty, where=denominator > 0)


def _exp_of_ratio(means: Floats) -> Floats:
    exponents: Floats = np.exp(np.minimum(_ratio(means), 700.0))
    return exponents


def _share(means: Floats) -> Floats:
    """Of distinct n-grams among all; 1 without any, since nothing is repeated."""
    share: Floats = np.nan_to_num(_ratio(means), nan=1.0)
    return share


def _repeated_share(means: Floats) -> Floats:
    return 1.0 - _share(means)


def _product_of_shares(means: Floats) -> Floats:
    product: Floats = _share(means[..., 0:2]) * _share(means[..., 2:4]) * _share(means[..., 4:6])
    return product

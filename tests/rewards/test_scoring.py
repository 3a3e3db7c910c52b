"""Whatever a reward returns, scoring either has float32 scores with counted gaps or says what is wrong."""

import math
import time
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quark.errors import RewardError
from quark.rewards.scoring import score

PROMPTS = ["p0", "p1", "p2"]
COMPLETIONS = ["c0", "c1", "c2"]
POLICIES = (
    {"on_error": "fail"},
    {"on_error": "nan"},
    {"on_error": "nan", "retries": 1, "backoff_s": 1e-3},
)


class Returning:
    name = "tested"

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *, prompts, completions):
        return self.function(prompts, completions)


def outcome_of(value, **options):
    return score(Returning(lambda p, c: value), PROMPTS, COMPLETIONS, **options)


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, -3],
        (1, 2.5, -3),
        [np.float64(1), np.float32(2.5), np.int64(-3)],
        np.array([1, 2.5, -3]),
        torch.tensor([1, 2.5, -3]),
        torch.tensor([1, 2.5, -3], requires_grad=True),
        pl.Series([1.0, 2.5, -3.0]),
        [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(-3.0)],
    ],
)
def test_numbers_in_any_sequence_become_float32_in_order(value):
    outcome = outcome_of(value)
    assert outcome.scores.dtype == np.float32
    assert outcome.scores.tolist() == [1.0, 2.5, -3.0]
    assert (outcome.num_failed, outcome.num_nonfinite, outcome.messages) == (0, 0, ())


@pytest.mark.parametrize(
    ("value", "num_nonfinite"),
    [(None, 0), (math.nan, 1), (math.inf, 1), (-math.inf, 1), (1e39, 1), (10**400, 1)],
)
def test_what_is_no_score_becomes_nan_and_is_counted(value, num_nonfinite):
    outcome = outcome_of([0.5, value, 1.5])
    assert outcome.scores[[0, 2]].tolist() == [0.5, 1.5]
    assert np.isnan(outcome.scores[1])
    assert (outcome.num_failed, outcome.num_nonfinite) == (1, num_nonfinite)
    assert "tested" in outcome.messages[0]
    assert "completion 1" in outcome.messages[0]


@pytest.mark.parametrize("length", [0, 1, 2, 4])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_wrong_length_raises_in_every_mode(length, policy):
    with pytest.raises(RewardError, match=rf"'tested' returned {length} scores? for 3"):
        outcome_of([1.0] * length, **policy)


@pytest.mark.parametrize(
    "value",
    [True, np.True_, "1.0", b"1", [1.0], {}, 1j, torch.tensor(True), object()],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_cannot_be_a_score_raises_with_function_index_and_value(value, policy):
    with pytest.raises(RewardError, match=r"'tested' returned .* for completion 2"):
        outcome_of([0.0, 1.0, value], **policy)


@pytest.mark.parametrize(
    "value",
    [
        None,
        1.0,
        "abc",
        {"a": 1.0, "b": 2.0, "c": 3.0},
        {1.0, 2.0, 3.0},
        (x for x in (1.0, 2.0, 3.0)),
        np.ones((3, 1)),
        torch.ones(1, 3),
        torch.tensor(1.0),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_is_no_list_of_scores_raises(value, policy):
    with pytest.raises(RewardError, match="'tested' returned"):
        outcome_of(value, **policy)


def test_what_is_returned_is_shown_on_one_line():
    with pytest.raises(RewardError) as raised:
        outcome_of({str(number): np.ones((3, 3)) for number in range(2)})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "num_merged"),
    [
        ([1e9, 1e9 + 0.001, 1e9 + 0.002], 3),
        ([1e9, 1e9 + 0.001, 0.5], 2),
        ([0.1 + 0.2, 0.3, 0.5], 0),  # the same number, rounded in two ways
        ([1.0, 1.0, 2.0], 0),
        (np.array([1e9, 1e9 + 0.001, 0.5], np.float32), 0),
        ([None, math.nan, 1e39], 0),
    ],
)
def test_scores_that_float32_does_not_tell_apart_are_counted(value, num_merged):
    outcome = outcome_of(value)
    assert outcome.num_merged == num_merged
    assert (outcome.merged_message is not None) == bool(num_merged)
    if num_merged == 2:
        assert "67% of the scores tie" in outcome.merged_message
        assert "such as 1000000000.0 and 1000000000.001" in outcome.merged_message


def test_a_small_share_of_such_scores_is_not_worth_a_word():
    scores = [float(number) for number in range(500)]
    outcome = score(Returning(lambda p, c: [*scores, 1e9, 1e9 + 0.001]), ["p"] * 502, ["c"] * 502)
    assert (outcome.num_merged, outcome.merged_message) == (2, None)


def test_an_array_of_booleans_raises():
    with pytest.raises(RewardError, match="bool True for completion 0"):
        outcome_of(np.array([True, False, True]))


def test_a_raising_reward_stops_the_run_and_names_where():
    def fails(prompts, completions):
        raise KeyError("missing")

    with pytest.raises(
        RewardError, match=r"'tested' raised on completions 0 to 2: KeyError"
    ) as info:
        score(Returning(fails), PROMPTS, COMPLETIONS)
    assert isinstance(info.value.__cause__, KeyError)


def test_with_nan_only_the_failing_batch_is_lost():
    def fails_on_c1(prompts, completions):
        if "c1" in completions:
            raise ValueError("no")
        return [1.0] * len(completions)

    outcome = score(Returning(fails_on_c1), PROMPTS, COMPLETIONS, on_error="nan", batch_size=1)
    assert np.isnan(outcome.scores).tolist() == [False, True, False]
    assert outcome.num_failed == 1
    assert outcome.num_nonfinite == 0
    assert "ValueError: no" in outcome.messages[0]


def test_interrupts_pass_through():
    def interrupted(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Returning(interrupted), PROMPTS, COMPLETIONS, on_error="nan")


def test_a_reward_that_changes_its_inputs_changes_nothing_of_ours():
    def vandal(prompts, completions):
        values = [float(len(text)) for text in completions]
        prompts.clear()
        completions.clear()
        return values

    prompts, completions = list(PROMPTS), list(COMPLETIONS)
    assert score(Returning(vandal), prompts, completions).scores.tolist() == [2.0, 2.0, 2.0]
    assert (prompts, completions) == (PROMPTS, COMPLETIONS)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)), st.integers(1, 7))
def test_batches_do_not_change_scores(values, batch_size):
    completions = [str(index) for index in range(len(values))]
    reward = Returning(lambda p, c: [values[int(text)] for text in c])
    outcome = score(reward, [""] * len(values), completions, batch_size=batch_size)
    assert outcome.scores.tolist() == values


def test_messages_stay_few():
    outcome = score(
        Returning(lambda p, c: [None]), [""] * 100, [str(i) for i in range(100)], batch_size=1
    )
    assert outcome.num_failed == 100
    assert 1 <= len(outcome.messages) <= 5


def test_prompts_and_completions_must_match():
    with pytest.raises(ValueError, match="2 prompts for 3 completions"):
        score(Returning(lambda p, c: []), PROMPTS[:2], COMPLETIONS)


def test_a_reward_that_calls_exit_does_not_end_the_run():
    def leaves(prompts, completions):
        raise SystemExit(0)

    with pytest.raises(RewardError, match="SystemExit: 0"):
        score(Returning(leaves), PROMPTS, COMPLETIONS)
    assert score(Returning(leaves), PROMPTS, COMPLETIONS, on_error="nan").num_failed == 3


class Flaky:
    name = "flaky"

    def __init__(self, num_failures, error=None):
        self.left = num_failures
        self.error = error or ConnectionError("lost")

    def __call__(self, *, prompts, completions):
        if self.left:
            self.left -= 1
            raise self.error
        return [1.0] * len(completions)


@pytest.mark.parametrize("on_error", ["fail", "nan"])
def test_a_batch_that_raised_is_tried_again_and_that_is_told(on_error):
    outcome = score(Flaky(3), PROMPTS, COMPLETIONS, on_error=on_error, retries=3, backoff_s=1e-3)
    assert outcome.scores.tolist() == [1.0, 1.0, 1.0]
    assert (outcome.num_failed, outcome.num_retried) == (0, 3)
    assert outcome.messages == (
        "reward 'flaky' raised on completions 0 to 2: ConnectionError: lost; tried again",
    )


def test_after_the_last_retry_the_policy_decides():
    options = {"retries": 2, "backoff_s": 1e-3}
    with pytest.raises(RewardError, match=r"ConnectionError: lost \(attempt 3\)"):
        score(Flaky(3), PROMPTS, COMPLETIONS, **options)
    # One batch is lost, the next ones are not.
    outcome = score(Flaky(3), PROMPTS, COMPLETIONS, on_error="nan", batch_size=1, **options)
    assert np.isnan(outcome.scores).tolist() == [True, False, False]
    assert (outcome.num_failed, outcome.num_retried) == (1, 2)


def test_waits_between_attempts_grow():
    started = time.monotonic()
    score(Flaky(3), PROMPTS, COMPLETIONS, retries=3, backoff_s=0.02)
    assert time.monotonic() - started >= 0.02 + 0.04 + 0.08


def test_what_is_final_or_a_mistake_is_not_tried_again():
    final = Flaky(9, RewardError("the server refused"))
    with pytest.raises(RewardError, match="the server refused"):
        score(final, PROMPTS, COMPLETIONS, retries=5)
    assert final.left == 8
    calls = []
    wrong = Returning(lambda p, c: calls.append(1) or [1.0])
    with pytest.raises(RewardError, match="returned 1 score for 3"):
        score(wrong, PROMPTS, COMPLETIONS, retries=5)
    assert len(calls) == 1

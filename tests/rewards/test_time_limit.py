"""A function that hangs is left behind, and what it says later is not heard."""

import sqlite3
import threading
import time

import numpy as np
import pytest

from quark.errors import RewardError
from quark.rewards.build import build_judges, build_reward, reward_provenance
from quark.rewards.config import RewardConfig
from quark.rewards.scoring import score
from quark.rewards.time_limit import MAX_ABANDONED, TimeLimited

LIMIT_S = 0.3


class Gated:
    """Hangs on the texts "hang" until it is let go."""

    name = "gated"

    def __init__(self):
        self.gate = threading.Event()
        self.threads = set()

    def __call__(self, *, prompts, completions):
        self.threads.add(threading.current_thread())
        if "hang" in completions:
            assert self.gate.wait(10.0)
        return [float(len(text)) for text in completions]


@pytest.fixture
def gated():
    reward = Gated()
    yield reward
    reward.gate.set()
    for thread in reward.threads - {threading.current_thread()}:
        thread.join()


def test_in_time_nothing_changes(gated):
    limited = TimeLimited(gated, 10.0)
    assert limited(prompts=["", ""], completions=["a", "bcd"]) == [1.0, 3.0]
    assert limited.name == "gated"


def test_a_call_that_hangs_is_a_failure_that_names_the_setting(gated):
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=r"TimeoutError: no scores after 0\.3 s \(reward\.timeout_s\)"
    ):
        score(TimeLimited(gated, LIMIT_S), [""], ["hang"])
    assert time.monotonic() - started < 5.0


def test_only_the_batch_that_hangs_is_lost_and_late_scores_are_not_used(gated):
    outcome = score(
        TimeLimited(gated, LIMIT_S), [""] * 3, ["a", "hang", "bcd"], on_error="nan", batch_size=1
    )
    gated.gate.set()
    assert np.isnan(outcome.scores).tolist() == [False, True, False]
    assert outcome.num_failed == 1
    assert "TimeoutError" in outcome.messages[0]


def test_a_call_that_hangs_once_is_made_again(gated):
    texts = [["hang"], ["fine"]]

    class HangsOnce:
        name = "once"

        def __call__(self, *, prompts, completions):
            return gated(prompts=prompts, completions=texts.pop(0))

    outcome = score(TimeLimited(HangsOnce(), LIMIT_S), [""], ["x"], retries=1, backoff_s=1e-3)
    assert outcome.scores.tolist() == [4.0]
    assert (outcome.num_failed, outcome.num_retried, texts) == (0, 1, [])


def test_where_calls_keep_hanging_no_more_are_begun_until_they_end(gated):
    limited = TimeLimited(gated, LIMIT_S)
    for _ in range(MAX_ABANDONED):
        with pytest.raises(TimeoutError):
            limited(prompts=[""], completions=["hang"])
    with pytest.raises(RewardError, match="4 calls of reward 'gated' have been hanging"):
        limited(prompts=[""], completions=["fine"])
    assert len(gated.threads) == MAX_ABANDONED
    gated.gate.set()
    for thread in gated.threads:
        thread.join()
    assert limited(prompts=[""], completions=["fine"]) == [4.0]


@pytest.mark.parametrize("error", [KeyError("k"), SystemExit(0)])
def test_what_the_function_raises_comes_through(error):
    class Raising:
        name = "raising"

        def __call__(self, *, prompts, completions):
            raise error

    with pytest.raises(type(error)) as info:
        TimeLimited(Raising(), 10.0)(prompts=[""], completions=[""])
    assert info.value is error


def test_a_function_is_limited_only_where_asked(tmp_path):
    """Without a limit it is called in the caller's thread, where an SQLite connection of its own works."""
    path = tmp_path / "r.py"
    path.write_text(
        "import sqlite3\n"
        "class Stored:\n"
        "    def __init__(self):\n"
        "        self.connection = sqlite3.connect(':memory:')\n"
        "    def __call__(self, prompts, completions):\n"
        "        return [self.connection.execute('select 2.0').fetchone()[0] for _ in completions]\n"
    )
    free = build_reward(RewardConfig(name=f"{path}:Stored"))
    limited = build_reward(RewardConfig(name=f"{path}:Stored", timeout_s=5.0))
    assert list(free(prompts=[""], completions=[""])) == [2.0]
    with pytest.raises(sqlite3.ProgrammingError, match="thread"):
        limited(prompts=[""], completions=[""])
    assert reward_provenance(limited) == reward_provenance(free)
    free._function.connection.close()
    limited._reward._function.connection.close()


def test_judges_have_the_limit_of_the_reward(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def judge(prompts, completions):\n    return [1.0] * len(completions)\n")
    name = f"{file}:judge"
    assert isinstance(build_judges((name,), RewardConfig(timeout_s=9.0))[name], TimeLimited)
    assert not isinstance(build_judges((name,), RewardConfig())[name], TimeLimited)

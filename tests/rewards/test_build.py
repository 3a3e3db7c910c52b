"""From the configuration to the reward, and the rewards that are formulas."""

import doctest
import importlib

import pytest
from pydantic import ValidationError

from quark.assets import asset_path
from quark.errors import ConfigError, RewardError
from quark.rewards.base import RewardFunction
from quark.rewards.build import build_reward, is_same_scorer, reward_provenance
from quark.rewards.checking import SAMPLES, check_reward
from quark.rewards.config import RewardConfig
from quark.rewards.heuristics import (
    DiversityReward,
    LengthConfig,
    LengthReward,
    RegexConfig,
    RegexReward,
)
from quark.rewards.scoring import score


def scores(reward, *completions):
    return list(reward(prompts=[""] * len(completions), completions=completions))


@pytest.mark.parametrize(
    "module",
    [
        "quark.assets",
        "quark.text_statistics",
        "quark.rewards.base",
        "quark.rewards.build",
        "quark.rewards.heuristics",
        "quark.rewards.linear",
        "quark.rewards.vader",
    ],
)
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", ["sentiment", "toxicity", "vader", "diversity", "length", "regex"])
def test_every_local_reward_scores_every_text(name):
    reward = build_reward(RewardConfig(name=name, regex=RegexConfig(pattern="e")))
    assert isinstance(reward, RewardFunction)
    assert reward.name == name
    hostile = ["", " ", "\x00", "\ud800", "é" * 5000, "a\u0301\u200d", "1e400", "\n\n"]
    outcome = score(reward, [""] * len(hostile), hostile)
    assert outcome.num_failed == 0


def test_higher_is_better():
    for name in ("sentiment", "toxicity", "vader"):
        reward = build_reward(RewardConfig(name=name))
        good, bad = scores(
            reward, "great, easy to use, I love it", "terrible stupid crap, I hate it"
        )
        assert good > bad + 0.3


def test_the_prompt_can_be_part_of_the_text():
    alone = build_reward(RewardConfig(name="length", length=LengthConfig(target=2)))
    both = build_reward(
        RewardConfig(name="length", input="prompt_and_completion", length=LengthConfig(target=2))
    )
    texts = {"prompts": ["the"], "completions": [" menu"]}
    assert list(alone(**texts)) == [1 / 1.5]
    assert list(both(**texts)) == [1.0]
    assert reward_provenance(both) == reward_provenance(alone) | {"input": "prompt_and_completion"}


@pytest.mark.parametrize(
    ("name", "settings", "others"),
    [
        ("length", {}, [{"target": 6}, {"minimum": 6}, {"maximum": 6}, {"unit": "characters"}]),
        (
            "regex",
            {"pattern": "a"},
            [
                {"pattern": "b"},
                {"pattern": "a", "mode": "count"},
                {"pattern": "a", "ignore_case": True},
                {"pattern": "a", "unwanted": True},
            ],
        ),
    ],
)
def test_every_setting_that_changes_scores_is_in_the_provenance(name, settings, others):
    known = [
        reward_provenance(build_reward(RewardConfig.model_validate({"name": name, name: given})))
        for given in [settings, *others]
    ]
    assert all(found["name"] == name for found in known)
    assert all(known.count(found) == 1 for found in known)


@pytest.mark.parametrize("name", ["http", "module:function"])
def test_rewards_that_get_the_prompt_anyway_refuse_to_have_it_twice(name, tmp_path):
    if name != "http":
        (tmp_path / "r.py").write_text("def f(prompts, completions): return []\n")
        name = f"{tmp_path}/r.py:f"
    config = RewardConfig(
        name=name, input="prompt_and_completion", http={"url": "http://localhost/"}
    )
    with pytest.raises(ConfigError, match="prompts and completions apart"):
        build_reward(config)


def test_a_folder_with_a_slash_is_a_scorer():
    folder = asset_path("rewards", "sentiment")
    reward = build_reward(RewardConfig(name=str(folder)))
    assert reward.name == "sentiment"
    assert reward_provenance(reward)["folder"] == str(folder)
    with pytest.raises(RewardError, match="does not hold a linear scorer"):
        build_reward(RewardConfig(name="./nowhere"))


def test_an_unknown_name_gets_a_hint():
    with pytest.raises(ValidationError, match="did you mean 'toxicity'"):
        RewardConfig(name="toxicty")
    with pytest.raises(ValidationError, match="module:function"):
        RewardConfig(name="joy")


def test_diversity_is_one_without_repetition():
    assert scores(DiversityReward(), "all of it differs here", "no no no no no no", "") == [
        1.0,
        pytest.approx(1 / 5 * 1 / 4 * 1 / 3),
        1.0,
    ]


def test_length_limits():
    reward = LengthReward(LengthConfig(unit="characters", minimum=2, maximum=4))
    assert scores(reward, "ab", "abcd", "a", "", "abcdefgh") == [1.0, 1.0, 2 / 3, 0.5, 0.5]
    with pytest.raises(ValidationError, match="below minimum"):
        LengthConfig(minimum=3, maximum=2)
    with pytest.raises(ValidationError, match="either target or"):
        LengthConfig(target=3, maximum=2)


def test_regex_modes():
    text = "Good, good battery"
    for config, expected in [
        ({"pattern": "good"}, 1.0),
        ({"pattern": "bad"}, 0.0),
        ({"pattern": "bad", "unwanted": True}, 1.0),
        ({"pattern": "good", "mode": "count"}, 1.0),
        ({"pattern": "good", "mode": "count", "ignore_case": True}, 2.0),
        ({"pattern": "good", "mode": "count", "ignore_case": True, "unwanted": True}, -2.0),
    ]:
        assert scores(RegexReward(RegexConfig(**config)), text) == [expected]
    with pytest.raises(ValidationError, match="not a regular expression"):
        RegexConfig(pattern="(")


def test_a_regex_reward_without_pattern_is_refused():
    with pytest.raises(RewardError, match=r"reward\.regex\.pattern"):
        build_reward(RewardConfig(name="regex"))


class Fixed:
    name = "fixed"

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, *, prompts, completions):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_a_sound_reward_passes_the_check():
    report = check_reward(build_reward(RewardConfig(name="sentiment")))
    assert report.num_samples == len(SAMPLES)
    assert report.warnings == ()
    assert report.is_repeatable
    assert not report.is_constant
    assert 0 < report.minimum < report.mean < report.maximum < 1
    assert report.samples_per_s > 0
    assert [sample.completion for sample in report.scores] == [text for _, text in SAMPLES]


@pytest.mark.parametrize(
    ("answers", "warning"),
    [
        ([[1.0, 1.0, 1.0]], "nothing to learn"),
        ([[None, None, None]], "3 of 3 samples were not scored"),
        ([[1.0, float("nan"), 2.0]], "1 of 3 samples were not scored"),
        ([[0.0, 0.0, 1.0]], "67% of the scores tie"),
        ([[0.0, 1.0, 2.0], [0.0, 1.0, 3.0]], "a second call gave other scores"),
    ],
)
def test_the_check_warns(answers, warning):
    report = check_reward(Fixed(*answers), [("", "a"), ("", "b"), ("", "c")])
    assert any(warning in text for text in report.warnings)


def test_equal_texts_do_not_count_as_ties():
    report = check_reward(Fixed([1.0, 1.0, 2.0]), [("", "a"), ("", "a"), ("", "b")])
    assert report.repeated_share == 0.0
    assert not report.is_constant


def test_one_text_may_have_a_score_for_each_prompt():
    report = check_reward(Fixed([1.0, 2.0, 3.0]), [("a", "x"), ("b", "x"), ("c", "x")])
    assert not report.is_constant
    assert not report.warnings


def test_the_check_needs_samples_and_scores():
    with pytest.raises(ValueError, match="no samples"):
        check_reward(Fixed([]), [])
    with pytest.raises(RewardError, match="2 scores for 1"):
        check_reward(Fixed([1.0, 2.0]), [("", "a")])


def test_the_complement_of_a_reward_is_one_minus_its_score():
    texts = {"prompts": ["the menu", "the menu"], "completions": [" is easy", " is confusing"]}
    plain = build_reward(RewardConfig(name="sentiment"))
    negative = build_reward(RewardConfig(name="sentiment", complement=True))
    assert negative.name == "not sentiment"
    assert negative(**texts) == pytest.approx([1 - score for score in plain(**texts)])
    assert negative(prompts=[], completions=[]) == []
    assert is_same_scorer(plain, negative)
    joined = build_reward(
        RewardConfig(name="sentiment", complement=True, input="prompt_and_completion")
    )
    assert joined(**texts) != negative(**texts)

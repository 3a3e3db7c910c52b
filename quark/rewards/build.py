"""From the configuration to a reward function."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from quark.assets import asset_path
from quark.errors import ConfigError, RewardError
from quark.rewards.base import RewardFunction
from quark.rewards.config import GIVEN_PREFIX, RewardConfig
from quark.rewards.fields import FieldsAsked, call_with, fields_asked
from quark.types import Json


def build_reward(config: RewardConfig, given: RewardFunction | None = None) -> RewardFunction:
    """The reward that ``config.name`` names; ``given`` is the object behind a name such as ``python:mine``.

    >>> reward = build_reward(RewardConfig(name="length", length={"maximum": 3}))
    >>> reward(prompts=["", ""], completions=["easy to use", "not so easy to use at all"])
    [1.0, 0.4285714285714286]

    Raises:
        RewardError: It cannot be loaded; names what is missing.
        ConfigError: A setting does not fit the reward.
    """
    if config.name == "ensemble":
        from quark.rewards.ensemble import EnsembleReward

        alone = {"members": (), "on_error": "fail"}
        members = [
            build_reward(config.model_copy(update={"name": name, **alone}))
            for name in config.members
        ]
        return EnsembleReward(
            members, provenance=_members_provenance(members), retries=config.retries or 0
        )
    reward = _reward_of_completions(config, given)
    if config.input == "completion":
        return Complement(reward) if config.complement else reward
    if config.name == "http" or ":" in config.name:
        raise ConfigError(
            f"reward.input = {config.input!r} does not fit {config.name!r}, which gets prompts and "
            "completions apart: join them there"
        )
    joined = PromptAndCompletion(reward)
    return Complement(joined) if config.complement else joined


def build_judges(names: tuple[str, ...], settings: RewardConfig) -> Mapping[str, RewardFunction]:
    """Rewards that are measured and never trained on, as ``settings`` say of waiting and of each kind."""
    shared = {
        "retries": settings.retries,
        "timeout_s": settings.timeout_s,
        "classifier": settings.classifier,
        "http": settings.http,
        "length": settings.length,
        "regex": settings.regex,
    }
    return {name: build_reward(RewardConfig(name=name, on_error="nan", **shared)) for name in names}


def _reward_of_completions(config: RewardConfig, given: RewardFunction | None) -> RewardFunction:
    match config.name:
        case "sentiment" | "toxicity":
            from quark.rewards.linear import LinearReward

            return LinearReward.load(asset_path("rewards", config.name))
        case "vader":
            from quark.rewards.vader import VaderReward

            return VaderReward()
        case "diversity":
            from quark.rewards.heuristics import DiversityReward

            return DiversityReward()
        case "length":
            from quark.rewards.heuristics import LengthReward

            return LengthReward(config.length)
        case "regex":
            from quark.rewards.heuristics import RegexReward

            return RegexReward(config.regex)
        case "classifier":
            from quark.rewards.classifier import ClassifierReward

            return ClassifierReward(config.classifier)
        case "http":
            from quark.rewards.http import HttpReward

            return HttpReward(config.http, retries=config.retries, timeout_s=config.timeout_s)
        case name if ":" in name:
            function = _function(name, given)
            if config.timeout_s is None:
                return function
            from quark.rewards.time_limit import TimeLimited

            return TimeLimited(function, config.timeout_s)
        case folder:
            return _scorer_in(Path(folder), config)


def _scorer_in(folder: Path, config: RewardConfig) -> RewardFunction:
    """The scorer that ``quark reward train`` wrote into ``folder``, of either kind."""
    from quark.rewards.classifier import CLASSIFIER_FORMAT, TrainedClassifier
    from quark.rewards.linear import LinearReward, scorer_format

    if scorer_format(folder) == CLASSIFIER_FORMAT:
        return TrainedClassifier(folder, config.classifier)
    return LinearReward.load(folder)


def _function(name: str, given: RewardFunction | None) -> RewardFunction:
    if name.startswith(GIVEN_PREFIX):
        if given is None:
            raise RewardError(
                f"the reward {name} is an object that was passed in Python, and no file holds it: pass it again "
                "(quark.Run(RUN_DIR).resume(reward=...), or reward=... of its other methods), or name a reward "
                "that a command can load"
            )
        return given
    from quark.rewards.callable import CallableReward

    return CallableReward(name)


class PromptAndCompletion:
    """Lets a reward score each prompt followed by its completion."""

    def __init__(self, reward: RewardFunction) -> None:
        self._reward = reward

    @property
    def name(self) -> str:
        """The name of the reward inside."""
        return self._reward.name

    @property
    def provenance(self) -> Mapping[str, Json]:
        """Of the reward inside, and that it sees the prompt."""
        return {**reward_provenance(self._reward), "input": "prompt_and_completion"}

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str]
    ) -> Sequence[float | None]:
        """Score each prompt joined with its completion."""
        joined = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return self._reward(prompts=prompts, completions=joined)


class Complement:
    """One minus a reward's score, for what is to be unlearned."""

    def __init__(self, reward: RewardFunction) -> None:
        self._reward = reward

    @property
    def name(self) -> str:
        """``not NAME``."""
        return f"not {self._reward.name}"

    @property
    def provenance(self) -> Mapping[str, Json]:
        """Of the reward inside, and that it is one minus it."""
        return {**reward_provenance(self._reward), "complement": True}

    @property
    def fields_asked(self) -> FieldsAsked:
        """Of the reward inside."""
        return fields_asked(self._reward)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **fields: Sequence[Json]
    ) -> Sequence[float | None]:
        """One minus each score; None stays None."""
        scores = call_with(self._reward, prompts, completions, fields)
        return [None if score is None else 1.0 - float(score) for score in scores]


def reward_provenance(reward: RewardFunction) -> Mapping[str, Json]:
    """Identifies the origin of the scores: the name, and the reward's file, hash or address if it has one."""
    details = getattr(reward, "provenance", {})
    return {"name": reward.name, **details}


def scorer_hash(reward: RewardFunction) -> str | None:
    """SHA-256 over everything that is known to decide the scores; None if nothing is (a server, a built-in).

    A wrapper such as the label or the text that is scored does not count: two rewards of one hash share a scorer.
    """
    digests = sorted(set(reward_content(reward).values()))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else None


def is_same_scorer(one: RewardFunction, other: RewardFunction) -> bool:
    """Whether two rewards rest on one scorer: the same files, server or built-in, whatever label or text they read."""
    known = scorer_hash(one)
    if known is not None or scorer_hash(other) is not None:
        return known == scorer_hash(other)
    return _identity(one) == _identity(other)


def _identity(reward: RewardFunction) -> Mapping[str, Json]:
    """The provenance without the text that is scored and whether it is one minus the score."""
    wrapping = ("name", "input", "complement")
    kept = {key: value for key, value in reward_provenance(reward).items() if key not in wrapping}
    return {**kept, "name": reward.name.removeprefix("not ")}


def reward_content(reward: RewardFunction) -> Mapping[str, str]:
    """SHA-256 of what decides the scores, by file; empty where nothing is known of it (a server, a built-in).

    Two rewards of one provenance give other scores where this differs.
    """
    provenance = reward_provenance(reward)
    files = provenance.get("files")
    content = (
        {name: str(digest) for name, digest in files.items()} if isinstance(files, dict) else {}
    )
    if isinstance(provenance.get("sha256"), str):
        main = Path(str(provenance.get("path") or provenance.get("folder"))).name
        content[main] = str(provenance["sha256"])
    return content


def _members_provenance(members: Sequence[RewardFunction]) -> dict[str, Json]:
    """The members' names and places, and the hashes of their files."""
    files: dict[str, Json] = {}
    names: list[Json] = []
    for number, member in enumerate(members, start=1):
        origin = reward_provenance(member)
        place = origin.get("folder") or origin.get("path")
        names.append(member.name if place is None else f"{member.name} ({place})")
        files |= {f"{number}/{file}": digest for file, digest in reward_content(member).items()}
    return {"members": names, "files": files}

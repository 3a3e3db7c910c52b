"""The configuration of the reward."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from quark.rewards.classifier import ClassifierConfig
from quark.rewards.heuristics import LengthConfig, RegexConfig
from quark.rewards.http import HttpConfig
from quark.rewards.scoring import OnError
from quark.settings import Settings

REWARD_NAMES: Final = (
    "sentiment",
    "toxicity",
    "vader",
    "diversity",
    "length",
    "regex",
    "classifier",
    "http",
    "ensemble",
)

GIVEN_PREFIX: Final = "python:"
"""Begins the name of a reward that is an object in the process that trains."""


def _known(name: str) -> str:
    if name in REWARD_NAMES or ":" in name or "/" in name or "\\" in name:
        return name
    near = difflib.get_close_matches(name, REWARD_NAMES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"no reward {name!r}; {hint}there is {', '.join(REWARD_NAMES)}, file.py:function, module:function, "
        "or a scorer's folder written with a slash"
    )


RewardName = Annotated[str, AfterValidator(_known)]
"""Validation of a reward's name."""


class RewardConfig(Settings):
    """The reward for completions."""

    name: RewardName = "sentiment"
    """``sentiment``, ``toxicity`` (one minus it), ``vader``, ``diversity``, ``length``, ``regex``,
    ``classifier``, ``http``; ``ensemble`` (the mean of ``members``, see ``[combiner]``); a function of your own as ``module:function`` or
    ``path/to/file.py:function``; or the folder of a scorer made by ``quark reward train``, written
    with a slash (``./my-scorer``). ``python:NAME`` stands for an object that was passed to
    ``quark.train``."""
    members: tuple[RewardName, ...] = ()
    """The rewards of an ``ensemble``, e.g. ``["./scorers/1/", "./scorers/2/"]``. Each is stored as a
    score column, ``member_1`` and so on."""
    input: Literal["completion", "prompt_and_completion"] = "completion"
    """The text that is scored: the completion alone (as in the paper), or the prompt followed by
    it. Functions and HTTP always get the two separately."""
    complement: bool = False
    """Train on one minus the score, which unlearns what the scorer measures: negative sentiment with
    ``sentiment``, for example. Judges and extra scores are not changed."""
    on_error: OnError = "fail"
    """If the reward raises, takes too long or returns no scores, and retries did not help: stop the
    run, or leave that batch without scores."""
    batch_size: int = Field(default=1024, ge=1)
    """Completions given to the reward at once."""
    retries: int | None = Field(default=None, ge=0)
    """Attempts after the first, with growing waits between them, before ``on_error`` applies.
    Unset: 4 for ``http``, otherwise none, because most errors of a function repeat. Also applies to
    judges and extra scores."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Longest wait, in seconds: for a server's whole answer to a batch (unset: 30), or for a
    function to score a batch (unset: no limit, and the function is called in the run's own thread).
    Also applies to judges and extra scores."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Settings of ``classifier``."""
    http: HttpConfig = HttpConfig()
    """Settings of ``http``."""
    length: LengthConfig = LengthConfig()
    """Settings of ``length``."""
    regex: RegexConfig = RegexConfig()
    """Settings of ``regex``."""

    @model_validator(mode="after")
    def _has_its_members(self) -> RewardConfig:
        if (self.name == "ensemble") != bool(self.members):
            raise ValueError(
                'reward.members and reward.name = "ensemble" belong together: set both, or neither'
            )
        if "ensemble" in self.members:
            raise ValueError("reward.members: a member of an ensemble cannot be an ensemble")
        return self

    @field_validator("on_error", mode="before")
    @classmethod
    def _nan_is_a_word(cls, value: object) -> object:
        # Without quotes, as on the command line, TOML reads nan as a number.
        return "nan" if isinstance(value, float) and math.isnan(value) else value

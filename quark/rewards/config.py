"""The configuration of the reward."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, field_validator

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
)


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
"""What names a reward wherever one is configured."""


class RewardConfig(Settings):
    """What completions are rewarded for."""

    name: RewardName = "sentiment"
    """``sentiment``, ``toxicity`` (one minus it), ``vader``, ``diversity``, ``length``, ``regex``, ``classifier``,
    ``http``; a function of your own as ``module:function`` or ``path/to/file.py:function``; or the folder of
    a scorer made by ``quark reward train``, written with a slash (``./my-scorer``)."""
    input: Literal["completion", "prompt_and_completion"] = "completion"
    """What text is scored: the completion alone (as in the paper), or the prompt followed by it. Functions and
    HTTP get both apart in any case."""
    on_error: OnError = "fail"
    """When the reward raises, takes too long or a server gives no scores, and retries did not help: stop the run,
    or count that batch as not scored."""
    batch_size: int = Field(default=1024, ge=1)
    """Completions given to the reward at once."""
    retries: int | None = Field(default=None, ge=0)
    """Attempts after the first, with growing waits between them, before ``on_error`` applies. Unset: 4 for ``http``,
    none for anything else: most errors of a function come again. Judges and extra scores have as many."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Longest wait, in seconds: for a server's whole answer to a batch (unset: 30), or for a function to score a batch (unset: no
    limit, and the function is called in the run's own thread). It is the judges' and the extra scores', too."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Settings of ``classifier``."""
    http: HttpConfig = HttpConfig()
    """Settings of ``http``."""
    length: LengthConfig = LengthConfig()
    """Settings of ``length``."""
    regex: RegexConfig = RegexConfig()
    """Settings of ``regex``."""

    @field_validator("on_error", mode="before")
    @classmethod
    def _nan_is_a_word(cls, value: object) -> object:
        # Without quotes, as on the command line, TOML reads nan as a number.
        return "nan" if isinstance(value, float) and math.isnan(value) else value

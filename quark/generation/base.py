"""The interface of a generator: prompts in, completions out, token for token as sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, Self

from pydantic import Field, model_validator

from quark.generation.completion_server import ServerConfig
from quark.settings import Settings
from quark.types import Completion, Json, Prompt


class SamplingConfig(Settings):
    """How completions are sampled. Every value is passed explicitly, so no library default leaks in."""

    max_new_tokens: int = Field(20, ge=1)
    """Completion length limit, in tokens."""
    min_new_tokens: int = Field(0, ge=0)
    """End-of-sequence is forbidden for this many tokens (the published code: 3)."""
    temperature: float = Field(1.0, ge=0.0)
    """Softmax temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus mass; 1 samples from the whole distribution."""
    top_k: int = Field(0, ge=0)
    """Keep only the k most likely tokens; 0 keeps all (the published code silently used 50)."""
    guidance: float = Field(0.0, ge=0.0)
    """Strength g of the guide. 0 samples from the policy itself. Text sampled without a reward token is
    never guided."""
    guide: Literal["tokens", "critic"] = "tokens"
    """What guides. ``tokens``: away from the worst reward token, from
    ``(1 + g) log p(. | token) - g log p(. | worst token)``, as DExperts (Liu et al. 2021) does with an
    expert and an anti-expert; costs a second forward pass. ``critic``: along the token critic that
    every round fits to the pool, from ``log p(. | token) + s b(.)`` with s from -g for the worst token
    to g for the best; costs nothing, and needs no training to work."""
    guidance_floor: float = Field(0.001, gt=0.0, le=1.0)
    """Sampling guided by tokens excludes tokens whose probability is below this share of the most likely
    token's (Li et al. 2023)."""
    batch_size: int = Field(128, ge=1)
    """Completions sampled at once."""
    backend: Literal["transformers", "http"] = "transformers"
    """Where a run samples: in this process, or on a server that receives its weights
    (docs/generation.md). ``quark generate`` and ``quark evaluate`` always sample in their own
    process."""
    http: ServerConfig = ServerConfig()
    """Settings of ``http``."""

    @model_validator(mode="after")
    def _server_suffices(self) -> Self:
        if self.backend == "http":
            for key in ("url", "reload_url"):
                if not getattr(self.http, key):
                    raise ValueError(f'backend "http" needs sampling.http.{key}')
            if self.guidance > 0.0:
                raise ValueError(
                    'a server does not guide: set guidance to 0, or backend to "transformers"'
                )
        return self

    @property
    def is_plain(self) -> bool:
        """Whether completions are drawn from the policy's own distribution, unchanged."""
        return self.guidance == 0.0 and self.is_plain_unguided

    @property
    def is_plain_unguided(self) -> bool:
        """Whether that is so of completions that are not guided, such as those without a reward token."""
        return (
            self.temperature == 1.0
            and self.top_p == 1.0
            and self.top_k == 0
            and self.min_new_tokens == 0
        )

    @property
    def provenance(self) -> dict[str, Json]:
        """Identifies the distribution that completions are drawn from; stored in the pool."""
        apart = {"backend", "http"} if self.backend == "transformers" else set()
        return self.model_dump(mode="json", exclude=apart)


class Generator(Protocol):
    """Samples completions from one model."""

    def generate(
        self, prompts: Sequence[Prompt], *, quantile: int | None, seed: int
    ) -> list[Completion]:
        """One completion per prompt, in order.

        Args:
            prompts: repeat a prompt for several completions of it.
            quantile: condition on this quantile's reward token (0 lowest); None gives no token.
            seed: u64; the same seed, prompts and weights give the same completions.
        """
        ...

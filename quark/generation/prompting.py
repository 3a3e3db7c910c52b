"""Checks the requests to a generator and decodes its completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from quark.errors import DataError, ModelError
from quark.models.reward_tokens import RewardTokens
from quark.types import Prompt


class PromptError(DataError, ValueError):
    """A prompt that the model cannot continue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRules:
    """The prompts and quantiles that a model accepts."""

    reward_tokens: RewardTokens | None
    vocab_size: int
    """Ids below it are of the base vocabulary."""
    max_positions: int | None
    """Length of the model's context; None if unknown."""
    max_new_tokens: int

    @property
    def num_quantiles(self) -> int:
        """K; 0 without reward tokens."""
        return 0 if self.reward_tokens is None else self.reward_tokens.num_quantiles

    def reward_token(self, quantile: int | None) -> int | None:
        """The id of the token that a quantile puts before a prompt; None without a quantile, or if none puts one there.

        Raises:
            ValueError: there is no such quantile.
        """
        if quantile is None:
            return None
        if self.reward_tokens is None:
            raise ValueError("this model has no reward tokens: generate with quantile=None")
        if not 0 <= quantile < self.reward_tokens.num_quantiles:
            raise ValueError(
                f"quantile {quantile} is not in 0 .. {self.reward_tokens.num_quantiles - 1}"
            )
        return self.reward_tokens.ids[quantile] if self.reward_tokens.are_placed else None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse requests that cannot be answered.

        Raises:
            PromptError: an empty prompt, or an id outside the base vocabulary.
            ModelError: prompt and completion do not fit the model's context.
        """
        for prompt in prompts:
            if not prompt.token_ids:
                raise PromptError(f"prompt {prompt.index} has no tokens")
            if max(prompt.token_ids) >= self.vocab_size or min(prompt.token_ids) < 0:
                raise PromptError(
                    f"prompt {prompt.index} has token {str(max(prompt.token_ids))[:20]}, outside the base vocabulary "
                    f"of {self.vocab_size}: its tokenizer is not the model's"
                )
            # One for the reward token; the last sampled token is never run.
            length = 1 + len(prompt.token_ids) + self.max_new_tokens - 1
            if self.max_positions is not None and length > self.max_positions:
                raise ModelError(
                    f"prompt {prompt.index} has {len(prompt.token_ids)} tokens; with a reward token and "
                    f"{self.max_new_tokens} new ones it exceeds the model's "
                    f"{self.max_positions} positions. Shorten prompts or lower max_new_tokens."
                )


class CompletionTexts:
    """Texts of sampled tokens.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Whether decoding drops the space before a first word, as SentencePiece tokenizers do.
        words = tokenizer("a b a", add_special_tokens=False).input_ids
        whole = self._decode([words])[0]
        self._joins_words = any(
            "".join(self._decode([words[:place], words[place:]])) != whole
            for place in range(1, len(words))
        )

    def __call__(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[list[int]]
    ) -> list[str]:
        """The text that each completion adds to its prompt, without special tokens."""
        if not self._joins_words:
            return self._decode(completions)
        # Decoded alone, a completion would lose the space before its first word.
        wholes = self._decode(
            [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
        )
        begins = self._decode([list(prompt) for prompt in prompts])
        return [
            whole[len(begin) :] if whole.startswith(begin) else alone
            for whole, begin, alone in zip(wholes, begins, self._decode(completions), strict=True)
        ]

    def _decode(self, rows: Sequence[list[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

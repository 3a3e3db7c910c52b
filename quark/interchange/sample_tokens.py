"""Token ids and texts of other tools' samples: given by their file, or made by a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from quark.data.prompt_rows import MAX_PROMPT_BYTES
from quark.interchange.layouts import ForeignSample, Messages

MAX_SAMPLE_METADATA = 1 << 19
"""Maximum size of a sample's metadata in bytes. The metadata of one append has at most twice this size."""
_MAX_PROMPT_METADATA = 1 << 20
_BYTES_OF_TOKEN = 36
"""Size of an integer in a tuple."""


class Tokenizer(Protocol):
    """The part of a tokenizer that an import uses."""

    chat_template: object

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Turn a text into token ids."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str:
        """Turn token ids into text."""
        ...

    def apply_chat_template(
        self, conversation: Messages, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Render a conversation as the model sees it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSample:
    """A sample of another tool, ready for a pool."""

    prompt_text: str
    prompt_tokens: tuple[int, ...]
    prompt_metadata: str
    completion_text: str
    completion_tokens: tuple[int, ...]
    has_own_tokens: bool
    """Whether the token ids come from the file, not from a tokenizer."""
    scores: Mapping[str, float]
    """Score column of the pool -> score."""
    source: ForeignSample
    digest: int
    """u64 digest of the row's content and its count in the file."""
    num_bytes: int
    """Upper bound of its memory."""


class SampleTokens:
    """Token ids and texts of foreign samples. Rendered prompts are cached."""

    _MOST = 4096
    _MOST_TOKENS = 1 << 20

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._prompts: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._num_tokens = 0
        """Number of tokens in the cache."""

    def of(
        self, sample: ForeignSample, scores: Mapping[str, float], digest: int, *, num_bytes: int
    ) -> TokenizedSample:
        """Convert a sample. Raises ValueError if it has no tokens or no text."""
        has_own_tokens = sample.prompt_tokens is not None and sample.completion_tokens is not None
        if has_own_tokens:
            prompt_tokens = tuple(sample.prompt_tokens or ())
            completion_tokens = tuple(sample.completion_tokens or ())
            self._refuse_unknown("prompt", prompt_tokens)
            self._refuse_unknown("completion", completion_tokens)
            prompt_text = (
                self._decoded(prompt_tokens)
                if sample.prompt is None
                else self._rendered(sample.prompt)
            )
            completion_text = (
                self._decoded(completion_tokens) if sample.completion is None else sample.completion
            )
            _check_text("completion", completion_text)
        else:
            if sample.prompt is None or sample.completion is None:
                raise ValueError("it has neither texts nor all token ids")
            prompt_text, prompt_tokens = self._prompt(sample.prompt)
            completion_text = sample.completion
            _check_text("completion", completion_text)
            completion_tokens = tuple(
                self._tokenizer.encode(completion_text, add_special_tokens=False)
            )
            self._refuse_unknown("completion", completion_tokens)
        if not prompt_tokens or not completion_tokens:
            raise ValueError(f"the {'completion' if prompt_tokens else 'prompt'} has no tokens")
        metadata = json.dumps(dict(sample.of_prompt), sort_keys=True)
        if len(metadata) > _MAX_PROMPT_METADATA:
            raise ValueError(
                f"the metadata of its prompt has {len(metadata):,} bytes; the most is {_MAX_PROMPT_METADATA:,}"
            )
        if len(json.dumps(sample.of_sample)) > MAX_SAMPLE_METADATA:
            raise ValueError(
                f"its other columns have more than {MAX_SAMPLE_METADATA:,} bytes, the most that is kept"
            )
        return TokenizedSample(
            prompt_text=prompt_text,
            prompt_tokens=prompt_tokens,
            prompt_metadata=metadata,
            completion_text=completion_text,
            completion_tokens=completion_tokens,
            has_own_tokens=has_own_tokens,
            scores=scores,
            source=sample,
            digest=digest,
            num_bytes=num_bytes
            + len(metadata)
            + _BYTES_OF_TOKEN * (len(prompt_tokens) + len(completion_tokens)),
        )

    def _prompt(self, prompt: str | Messages) -> tuple[str, tuple[int, ...]]:
        name = prompt if isinstance(prompt, str) else json.dumps(prompt, default=str)
        if name not in self._prompts:
            text = self._rendered(prompt)
            # The chat template writes the model's own special tokens.
            ids = tuple(self._tokenizer.encode(text, add_special_tokens=isinstance(prompt, str)))
            self._refuse_unknown("prompt", ids)
            if len(self._prompts) >= self._MOST or self._num_tokens > self._MOST_TOKENS:
                self._prompts.clear()
                self._num_tokens = 0
            self._prompts[name] = (text, ids)
            self._num_tokens += len(ids)
        return self._prompts[name]

    def _rendered(self, prompt: str | Messages) -> str:
        if isinstance(prompt, str):
            _check_text("prompt", prompt)
            return prompt
        if not self._tokenizer.chat_template:
            raise ValueError(
                "the prompt is a list of messages, and the tokenizer has no chat template to render it"
            )
        messages = [{"role": m["role"], "content": m.get("content") or ""} for m in prompt]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program and can raise anything
            raise ValueError(f"the chat template does not take the prompt: {error}") from error
        _check_text("prompt", text)
        return text

    def _decoded(self, ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _refuse_unknown(self, what: str, ids: tuple[int, ...]) -> None:
        if ids and (largest := max(ids)) >= self._vocab_size:
            raise ValueError(
                f"the {what} has the token {largest}, and the vocabulary has {self._vocab_size}: "
                "the samples are of another tokenizer"
            )


def _check_text(what: str, text: str) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the {what} holds half of a character (a lone surrogate)") from None
    if num_bytes > MAX_PROMPT_BYTES:
        raise ValueError(f"the {what} has {num_bytes:,} bytes; the most is {MAX_PROMPT_BYTES:,}")

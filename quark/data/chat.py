"""Prompts that are conversations: lists of messages, rendered by the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

from quark.errors import DataError
from quark.types import Json

Message: TypeAlias = Mapping[str, Json]
MESSAGES_KEY = "messages"
TOOLS_KEY = "tools"


class ChatTokenizer(Protocol):
    """The part of a tokenizer that renders conversations."""

    chat_template: Any

    def apply_chat_template(self, conversation: list[dict[str, Json]], **arguments: Any) -> Any:  # noqa: ANN401
        """Render a conversation."""
        ...


def messages_in(value: Json, place: str) -> tuple[Message, ...]:
    """The messages of a prompt.

    Args:
        value: what the row says.
        place: file and line, for error messages.

    Raises:
        DataError: it is no list of messages, or does not end before an answer.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{place}: {MESSAGES_KEY!r} is {repr(value)[:40]}, not a list of messages")
    messages: list[Message] = []
    for number, item in enumerate(value):
        if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
            raise DataError(
                f"{place}: message {number} is {repr(item)[:40]}, not an object with a role and a content"
            )
        # Columns of a Parquet file give each message the keys of all.
        messages.append({key: part for key, part in item.items() if part is not None})
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: the last message is the assistant's, and a prompt ends before the answer. Leave it out"
        )
    return tuple(messages)


def text_of_messages(messages: Sequence[Message]) -> str:
    """Messages as one JSON text, the same for the same messages."""
    return json.dumps([dict(message) for message in messages], ensure_ascii=False)


class Chat:
    """Renders conversations with a tokenizer's template.

    Args:
        tokenizer: of the model.
        arguments: further values for the template, such as ``enable_thinking``.
    """

    def __init__(self, tokenizer: ChatTokenizer, arguments: Mapping[str, Json]) -> None:
        self._tokenizer = tokenizer
        self._arguments = dict(arguments)

    def render(self, messages: Sequence[Message], tools: Json, place: str) -> str:
        """The text that the model continues: all messages and the header of the answer.

        Raises:
            DataError: the model has no template, or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(
                f"{place}: a prompt of messages needs a chat template, and the model's tokenizer has none. "
                "Use an instruction-tuned model, or put chat_template.jinja into the model's folder"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=cast("Any", tools),
                add_generation_prompt=True,
                tokenize=False,
                **self._arguments,
            )
        except Exception as err:
            raise DataError(
                f"{place}: the model's chat template refuses the messages: {type(err).__name__}: {err}"
            ) from err
        return str(text)


def without_the_oldest_turn(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The conversation without its oldest turn, up to the next message of a user; None if only one is left.

    System messages at the beginning stay.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] not in _HEADERS), len(messages))
    users = [i for i, message in enumerate(messages) if message["role"] == "user" and i > first]
    return (*messages[:first], *messages[users[0] :]) if users else None


_HEADERS = frozenset({"system", "developer"})

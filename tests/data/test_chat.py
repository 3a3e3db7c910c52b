"""Prompts that are conversations."""

from __future__ import annotations

import json

import pytest

from quark.data.prompts import PromptConfig, load_prompts
from quark.errors import DataError
from tests.models.test_chat_templates import MESSAGES, TEMPLATES, chat_tokenizer
from tests.tiny import byte_tokenizer

QUESTION = [{"role": "system", "content": "Be short."}, *MESSAGES]


def load(tmp_path, rows, tokenizer, **settings):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"max_tokens": 500, "num_evaluation": 1} | settings
    return load_prompts(PromptConfig(source=str(path), **settings), tokenizer, seed=0)


def conversation(question: str, *before: str) -> list[dict[str, str]]:
    messages = [QUESTION[0]]
    for text in before:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes"}]
    return [*messages, {"role": "user", "content": question}]


@pytest.mark.parametrize("field", ["messages", "prompt"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_model_sees_what_its_template_renders(template, field, tmp_path):
    """Once, without a second beginning-of-sequence token, and the reward can have the messages."""
    tokenizer = chat_tokenizer(TEMPLATES[template])
    found = load(
        tmp_path,
        [{field: MESSAGES, "answer": "42"}, {field: MESSAGES[:1]}],
        tokenizer,
    )
    for prompt in (*found.train, *found.evaluation):
        messages = prompt.metadata["messages"]
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        ).input_ids
        assert list(prompt.token_ids) == expected
        assert expected.count(tokenizer.bos_token_id) <= 1
        assert prompt.text == tokenizer.decode(expected, skip_special_tokens=True)
        if len(messages) == len(MESSAGES):
            assert prompt.metadata["answer"] == "42"


def test_tools_and_arguments_reach_the_template(tmp_path):
    tokenizer = chat_tokenizer(TEMPLATES["Qwen 3"])
    tool = {"type": "function", "function": {"name": "look_up"}}
    rows = [{"messages": MESSAGES, "tools": [tool]}, {"messages": MESSAGES[:1]}]
    found = load(tmp_path, rows, tokenizer, template_arguments={"enable_thinking": False})
    texts = [prompt.text for prompt in (*found.train, *found.evaluation)]
    assert all("</think>" in text for text in texts)
    assert sum("look_up" in text for text in texts) == 1


def test_two_rows_that_differ_in_their_tools_have_their_own_tokens(tmp_path):
    tokenizer = chat_tokenizer(TEMPLATES["Qwen 3"])
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("look_up", "add")]
    rows = [{"messages": MESSAGES, "tools": tool} for tool in (None, *tools)]
    rows.append({"messages": MESSAGES[:1], "split": "eval"})
    found = load(tmp_path, rows, tokenizer)
    texts = [prompt.text for prompt in found.train]
    assert [["look_up" in text, "add" in text] for text in texts] == [
        [False, False],
        [True, False],
        [False, True],
    ]


def test_an_over_long_conversation_loses_its_oldest_turns_and_never_its_header(tmp_path):
    tokenizer = chat_tokenizer(TEMPLATES["Llama 3"])
    rows = [
        {"messages": conversation("What now?", "a" * 500, "b" * 20)},
        {"messages": conversation("Where?")},
        {"messages": conversation("x" * 600)},
        {"messages": conversation("When?"), "split": "eval"},
    ]
    found = load(tmp_path, rows, tokenizer, max_tokens=500)
    texts = {prompt.text for prompt in (*found.train, *found.evaluation)}
    assert len(texts) == 3
    whole = next(text for text in texts if "What now?" in text)
    assert "a" * 500 not in whole
    assert "b" * 20 in whole
    for prompt in (*found.train, *found.evaluation):
        assert prompt.token_ids[0] == tokenizer.bos_token_id
        assert "Be short." in prompt.text
        assert prompt.text.endswith("assistant<|end_header_id|>\n\n")
    assert any("1 prompt cut to" in note for note in found.notes)
    assert any("1 prompt left out" in note for note in found.notes)


def test_conversations_that_cannot_be_prompts_are_refused_by_their_line(tmp_path):
    tokenizer = chat_tokenizer(TEMPLATES["Qwen 3"])
    for messages, reason in (
        (MESSAGES[:2], "assistant's"),
        (["Hi"], "message 0"),
        ([], "not a list of messages"),
    ):
        with pytest.raises(DataError, match=rf"jsonl:1: .*{reason}"):
            load(tmp_path, [{"messages": messages}], tokenizer)
    with pytest.raises(DataError, match="chat template"):
        load(tmp_path, [{"messages": MESSAGES}] * 2, byte_tokenizer())

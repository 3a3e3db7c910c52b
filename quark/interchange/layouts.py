"""The layouts that other tools write samples in: how each is recognized, and how its rows become samples.

A row that does not fit its layout raises ``ValueError`` with the column and the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from quark.formats import plain_json
from quark.types import FinishReason, Json

MAX_SCORE_COLUMNS = 256
"""Score columns of one file."""
_STEP_FOLDER = re.compile(r"step_(\d{1,9})")
_NOT_A_SCORE = re.compile(r"(^|_)(id|idx|index|seed|epoch|step|round|uid)$|^num_|^(fold|split)$")
"""Columns of numbers that count or name things."""


class Layout(StrEnum):
    """Which tool wrote a file."""

    QUARK = "quark"
    """``quark pool export``."""
    TRL = "trl"
    """``completions_*.parquet`` of TRL's ``log_completions``."""
    VERL = "verl"
    """verl's ``trainer.rollout_data_dir`` and ``validation_data_dir``."""
    PRIME_RL = "prime-rl"
    """``traces.jsonl`` of prime-rl and verifiers."""
    OPEN_INSTRUCT = "open-instruct"
    """Rollout shards of open-instruct, with token ids."""
    LM_EVAL = "lm-eval"
    """Samples files of lm-evaluation-harness (``--log_samples``)."""
    INSPECT = "inspect"
    """Logs of Inspect (``.eval``, ``.json``), read with its own package."""
    JSONL = "jsonl"
    """JSON lines with the columns ``prompt`` and ``completion``."""
    CSV = "csv"
    """The same as CSV."""
    PARQUET = "parquet"
    """The same as Parquet."""


Messages = Sequence[Mapping[str, Any]]
"""A conversation: mappings with ``role`` and ``content``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignSample:
    """One sample as its file has it: a text or token ids for each part, or both."""

    prompt: str | Messages | None = None
    completion: str | None = None
    prompt_tokens: Sequence[int] | None = None
    completion_tokens: Sequence[int] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    """By the file's own names; NaN where there is none."""
    reward: float = math.nan
    """The one that the tool trained on, or would."""
    step: int = 0
    finish_reason: FinishReason = FinishReason.UNKNOWN
    logprob_sampled: float = math.nan
    """In nats, of the whole completion."""
    of_prompt: Mapping[str, Json] = field(default_factory=dict)
    """Columns that belong to the prompt."""
    of_sample: Mapping[str, Json] = field(default_factory=dict)
    """All other columns."""


def recognize(file: Path, columns: Collection[str]) -> Layout | None:
    """The layout of a file with these columns in its first row; None where none fits."""
    found = set(columns)
    for layout, needed in _COLUMNS.items():
        if needed <= found:
            return layout
    if _first(_PROMPT, found) and _first(_COMPLETION, found):
        return {".csv": Layout.CSV, ".parquet": Layout.PARQUET}.get(
            file.suffix.lower(), Layout.JSONL
        )
    return None


_COLUMNS = {
    Layout.QUARK: {"key", "prompt_tokens", "completion_tokens", "settings"},
    Layout.OPEN_INSTRUCT: {"prompt_tokens", "response_tokens", "reward", "step"},
    Layout.PRIME_RL: {"task", "traces"},
    Layout.LM_EVAL: {"doc_id", "arguments", "resps"},
    Layout.TRL: {"step", "prompt", "completion", "advantage"},
    Layout.VERL: {"input", "output", "score", "step"},
}
"""The columns by which a layout is recognized, the most telling layout first."""
_PROMPT = ("prompt", "prompt_tokens", "prompt_ids")
_COMPLETION = ("completion", "response", "completion_tokens", "completion_ids")


class Reader:
    """Turns the records of one file into samples.

    A column keeps the role that its first value gives it: a number is a score, anything else is metadata.

    Args:
        layout: of the file; not ``QUARK`` or ``INSPECT``.
        file: its path may say the step.
        of_prompt: further columns that belong to the prompt.
    """

    def __init__(self, layout: Layout, file: Path, *, of_prompt: Collection[str] = ()) -> None:
        folder_step = next(
            (m for part in reversed(file.parts) if (m := _STEP_FOLDER.fullmatch(part))), None
        )
        self._step = int(folder_step[1]) if folder_step else 0
        self._of_prompt = frozenset(of_prompt)
        self._is_score: dict[str, bool] = {}
        self.samples: Callable[[Mapping[str, Any]], Iterator[ForeignSample]]
        """The samples of one record. Raises ValueError where it has none; the message names the column."""
        match layout:
            case Layout.PRIME_RL:
                self.samples = self._prime_rl
            case Layout.LM_EVAL:
                self.samples = self._lm_eval
            case Layout.OPEN_INSTRUCT:
                self.samples = self._open_instruct
            case Layout.TRL:
                self.samples = self._trl
            case Layout.VERL:
                self.samples = self._verl
            case _:
                self.samples = self._plain

    def _trl(self, record: Mapping[str, Any]) -> Iterator[ForeignSample]:
        rest = _without(record, "step", "prompt", "completion")
        scores, of_prompt, of_sample = self._sorted(rest)
        functions = [v for name, v in scores.items() if name != "advantage" and not math.isnan(v)]
        yield ForeignSample(
            prompt=_text_or_messages(record, "prompt"),
            completion=_reply(record, "completion"),
            step=_whole(record, "step"),
            scores=scores,
            reward=added(functions, "its scores") if functions else math.nan,
            of_prompt=of_prompt,
            of_sample=of_sample,
        )

    def _verl(self, record: Mapping[str, Any]) -> Iterator[ForeignSample]:
        rest = _without(record, "step", "input", "output", "score")
        scores, of_prompt, of_sample = self._sorted(rest, of_prompt=("gts", "data_source"))
        yield ForeignSample(
            prompt=_text(record, "input"),
            completion=_text(record, "output"),
            step=_whole(record, "step"),
            scores=scores,
            reward=_number(record, "score"),
            of_prompt=of_prompt,
            of_sample=of_sample,
        )

    def _open_instruct(self, record: Mapping[str, Any]) -> Iterator[ForeignSample]:
        rest = _without(
            record,
            *("step", "prompt_tokens", "response_tokens", "reward", "finish_reason", "logprobs"),
        )
        scores, of_prompt, of_sample = self._sorted(rest, of_prompt=("ground_truth", "dataset"))
        logprobs = record.get("logprobs")
        yield ForeignSample(
            prompt_tokens=_ids(record, "prompt_tokens"),
            completion_tokens=_ids(record, "response_tokens"),
            step=_whole(record, "step"),
            scores=scores,
            reward=_number(record, "reward"),
            finish_reason=_finish_reason(record.get("finish_reason")),
            logprob_sampled=math.nan if logprobs is None else _sum(record, "logprobs"),
            of_prompt=of_prompt,
            of_sample=of_sample,
        )

    def _lm_eval(self, record: Mapping[str, Any]) -> Iterator[ForeignSample]:
        responses = _flat_texts(record.get("resps"))
        if not responses:
            raise ValueError(
                "column resps: it holds no generated text (log-likelihoods are no samples)"
            )
        metrics = record.get("metrics")
        listed = metrics if isinstance(metrics, list) else ()
        names = [name for name in listed if isinstance(name, str) and name in record]
        if not names:
            names = [n for n, v in record.items() if _is_number(v) and not _NOT_A_SCORE.search(n)]
        known = ("arguments", "resps", "filtered_resps", "metrics", *names)
        _, _, of_sample = self._sorted(_without(record, *known), with_scores=False)
        of_prompt: dict[str, Json] = {
            name: of_sample[name] for name in ("doc", "target") if name in of_sample
        }
        # A metric belongs to the filtered responses as a whole: with several it is nobody's score.
        values = {n: _number(record, n) for n in names} if len(responses) == 1 else {}
        for response in responses:
            yield ForeignSample(
                prompt=_lm_eval_prompt(record.get("arguments")),
                completion=response,
                scores=values,
                reward=values[names[0]] if values else math.nan,
                of_prompt=of_prompt,
                of_sample={n: v for n, v in of_sample.items() if n not in of_prompt},
            )

    def _prime_rl(self, record: Mapping[str, Any]) -> Iterator[ForeignSample]:
        traces = record.get("traces")
        if not isinstance(traces, list) or not traces:
            raise ValueError("column traces: the episode has none")
        for number, trace in enumerate(traces):
            if not isinstance(trace, dict):
                raise ValueError(f"column traces: trace {number} is not an object")
            yield from self._trace(record, trace)

    def _trace(
        self, record: Mapping[str, Any], trace: Mapping[str, Any]
    ) -> Iterator[ForeignSample]:
        rewards, metrics = trace.get("rewards") or {}, trace.get("metrics") or {}
        if not isinstance(rewards, dict) or not isinstance(metrics, dict):
            raise ValueError("column traces: its rewards or metrics are not an object")
        scores = {name: _number(metrics, name) for name in metrics}
        total = []
        for name, value in rewards.items():
            entry = value if isinstance(value, dict) else {"score": value}
            score = _number(entry, "score")
            scores[name] = score
            if not math.isnan(score):
                total.append(score * (_number(entry, "weight") if "weight" in entry else 1.0))
        task = trace.get("task") or record.get("task")
        of_sample = {
            "episode": record.get("id"),
            "trace": trace.get("id"),
            "stop_condition": trace.get("stop_condition"),
        }
        for prompt, completion, nodes in _branches(trace.get("nodes")):
            ids, sampled, logprobs = _tokens_of_path(nodes)
            yield ForeignSample(
                prompt=prompt,
                completion=completion,
                prompt_tokens=ids,
                completion_tokens=sampled,
                step=self._step,
                scores=scores,
                reward=added(total, "column traces: the rewards") if total else math.nan,
                logprob_sampled=logprobs,
                of_prompt={} if task is None else {"task": plain_json(task)},
                of_sample={
                    name: plain_json(value)
                    for name, value in of_sample.items()
                    if value is not None
                },
            )

    def _plain(self, record: Mapping[str, Any]) -> Iterator[ForeignSample]:
        prompt_ids = _first(("prompt_tokens", "prompt_ids"), record)
        completion_ids = _first(("completion_tokens", "completion_ids"), record)
        text = _first(("completion", "response"), record)
        step = _first(("step", "round"), record)
        known = ("prompt", prompt_ids, completion_ids, text, step, "finish_reason", "reward")
        scores, of_prompt, of_sample = self._sorted(_without(record, *known))
        reward = math.nan
        if record.get("reward") is not None:
            reward = _number(record, "reward")
        elif (
            "reward" not in record and sum(self._is_score.get(name, False) for name in record) == 1
        ):
            reward = next(iter(scores.values()), math.nan)
        is_whole = prompt_ids is not None and completion_ids is not None
        yield ForeignSample(
            prompt=_text_or_messages(record, "prompt", is_needed=not is_whole),
            completion=_reply(record, text or "completion", is_needed=not is_whole),
            prompt_tokens=None if prompt_ids is None else _ids(record, prompt_ids),
            completion_tokens=None if completion_ids is None else _ids(record, completion_ids),
            step=0 if step is None else _whole(record, step),
            scores=scores,
            reward=reward,
            finish_reason=_finish_reason(record.get("finish_reason")),
            of_prompt=of_prompt,
            of_sample=of_sample,
        )

    def _sorted(
        self,
        columns: Mapping[str, Any],
        *,
        of_prompt: Collection[str] = (),
        with_scores: bool = True,
    ) -> tuple[dict[str, float], dict[str, Json], dict[str, Json]]:
        """Scores, metadata of the prompt, metadata of the sample."""
        scores: dict[str, float] = {}
        prompt: dict[str, Json] = {}
        sample: dict[str, Json] = {}
        for name, value in columns.items():
            if name in of_prompt or name in self._of_prompt:
                prompt[name] = plain_json(value)
            elif value is not None and with_scores and self._scores(name, value):
                scores[name] = _number(columns, name)
            elif value is not None:
                sample[name] = plain_json(value)
        return scores, prompt, sample

    def _scores(self, name: str, value: object) -> bool:
        """Whether a column is a score, as its first value said."""
        is_score = self._is_score.get(name)
        if is_score is None:
            is_score = _is_number(value) and not _NOT_A_SCORE.search(name)
            self._is_score[name] = is_score
            if sum(self._is_score.values()) > MAX_SCORE_COLUMNS:
                raise ValueError(f"column {name}: a file has at most {MAX_SCORE_COLUMNS} scores")
        return is_score


def _without(record: Mapping[str, Any], *names: str | None) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def _first(names: Sequence[str], found: Collection[str]) -> str | None:
    return next((name for name in names if name in found), None)


def _is_number(value: object) -> bool:
    if isinstance(value, str):  # of CSV
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float)


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    if value is None:
        return math.nan
    if not _is_number(value):
        raise ValueError(f"column {name}: {_shown(value)} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"column {name}: the number is too large") from None


def _whole(record: Mapping[str, Any], name: str) -> int:
    value = record.get(name)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"column {name}: {_shown(value)} is not a whole number from 0 to 2**32-1")
    return value


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"column {name}: {_shown(value)} is not a text")
    return value


def _text_or_messages(
    record: Mapping[str, Any], name: str, *, is_needed: bool = True
) -> str | Messages | None:
    value = record.get(name)
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return value
    if value is None and not is_needed:
        return None
    return _text(record, name)


def _reply(record: Mapping[str, Any], name: str, *, is_needed: bool = True) -> str | None:
    """A text, or the text of the messages that the model wrote."""
    value = record.get(name)
    if isinstance(value, list) and len(value) == 1 and _is_message(value[0]):
        return _content(value[0])
    if isinstance(value, list) and len(value) > 1:
        raise ValueError(
            f"column {name}: it has {len(value)} messages; only the last turn of a conversation is a completion"
        )
    if value is None and not is_needed:
        return None
    return _text(record, name)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise ValueError(f"a message of {_shown(message.get('role'))} has no text as its content")


def _ids(record: Mapping[str, Any], name: str) -> list[int]:
    value = record.get(name)
    if not isinstance(value, list) or any(
        type(item) is not int or not 0 <= item < 2**32 for item in value
    ):
        raise ValueError(f"column {name}: {_shown(value)} is not a list of token ids")
    return value


def _sum(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
        raise ValueError(f"column {name}: {_shown(value)} is not a list of numbers")
    return added(value, f"column {name}")


def added(numbers: Sequence[float], what: str) -> float:
    """Their sum. Raises ValueError, which begins with ``what``, where a float does not hold it."""
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # too large, or infinities of both signs
        raise ValueError(f"{what}: the numbers have no sum that a float holds") from None


def _finish_reason(value: object) -> FinishReason:
    match value:
        case "stop" | "eos" | "eos_token" | "end_turn":
            return FinishReason.STOP
        case "length" | "max_tokens":
            return FinishReason.LENGTH
        case _:
            return FinishReason.UNKNOWN


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _flat_texts(value: object) -> list[str]:
    """The texts of lm-eval's nested responses; empty where one is not a text."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    parts = [_flat_texts(item) for item in value]
    return [text for part in parts for text in part] if all(parts) else []


def _lm_eval_prompt(arguments: object) -> str:
    """The first argument of the first request."""
    if isinstance(arguments, dict):
        arguments = next(iter(arguments.values()), None)
    if isinstance(arguments, list) and arguments and isinstance(arguments[0], list):
        arguments = arguments[0]
    if isinstance(arguments, dict):
        prompt = arguments.get("arg_0")
    else:
        prompt = arguments[0] if isinstance(arguments, list) and arguments else None
    if not isinstance(prompt, str):
        raise ValueError("column arguments: its first request has no text")
    return prompt


def _branches(nodes: object) -> Iterator[tuple[Messages, str, list[Mapping[str, Any]]]]:
    """For every leaf that the model wrote: the messages before it, its text and the nodes from root to leaf."""
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise ValueError("column traces: its nodes are not a list of objects")
    parents = [node.get("parent") for node in nodes]
    for number, parent in enumerate(parents):
        if parent is not None and (type(parent) is not int or not 0 <= parent < number):
            raise ValueError(f"column traces: node {number} has no parent before it")
    num_found = 0
    for leaf in sorted(set(range(len(nodes))) - {p for p in parents if p is not None}):
        path = []
        at: int | None = leaf
        while at is not None:
            path.append(nodes[at])
            at = parents[at]
        path.reverse()
        while path and not path[-1].get("sampled"):
            path.pop()
        if len(path) < 2:
            continue
        messages = [node.get("message") for node in path]
        if not all(map(_is_message, messages)):
            raise ValueError("column traces: a node has no message")
        num_found += 1
        yield messages[:-1], _content(messages[-1]), path
    if not num_found:
        raise ValueError("column traces: the model wrote no message")


def _tokens_of_path(
    path: Sequence[Mapping[str, Any]],
) -> tuple[list[int] | None, list[int] | None, float]:
    """Prompt ids, sampled ids of the last message and their log-probability; None and NaN where ids are missing."""
    if not all(node.get("token_ids") for node in path):
        return None, None, math.nan
    prompt = [token for node in path[:-1] for token in _ids(node, "token_ids")]
    last = path[-1]
    ids, mask = _ids(last, "token_ids"), last.get("mask")
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise ValueError("column traces: mask and token_ids of a node differ in length")
    begin = next((at for at, is_sampled in enumerate(mask) if is_sampled), len(mask))
    end = max((at + 1 for at, is_sampled in enumerate(mask) if is_sampled), default=begin)
    logprobs = last.get("logprobs")
    return (
        prompt + ids[:begin],
        ids[begin:end],
        _sum(last, "logprobs") if logprobs else math.nan,
    )

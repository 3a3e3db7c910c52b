"""Files of samples as other tools write them, each by its released schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tests.tiny import byte_tokenizer

_TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    """Token ids of the byte tokenizer."""
    return list(_TOKENIZER.encode(text, add_special_tokens=False))


def json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trl(folder: Path, *, steps: int = 2, conversational: bool = False) -> Path:
    """``completions/`` of TRL's GRPO with ``log_completions``, made as its trainer makes the table."""
    folder = folder / "completions"
    folder.mkdir(parents=True)
    for step in range(1, steps + 1):
        prompts: list[Any] = ["One and one is", "One and one is", "The sky is", "The sky is"]
        completions: list[Any] = [f" two {step}", " three", " blue", " blue"]
        if conversational:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        table = {
            "step": [step] * 4,
            "prompt": prompts,
            "completion": completions,
            "accuracy_reward": [1.0, 0.0, 1.0, float("nan")],
            "FormatReward": [0.5, 0.25, 0.0, 0.0],
            "parsed": ["two", "three", None, "blue"],
            "advantage": [0.7, -0.7, 0.0, 0.0],
        }
        pd.DataFrame(table).to_parquet(folder / f"completions_{step:05d}.parquet")
    return folder


def verl(folder: Path) -> Path:
    rows = [
        {
            "input": f"user\nQuestion {index // 2}\nassistant\n",
            "output": f"Answer {index}",
            "gts": str(index // 2),
            "score": float(index % 2),
            "step": 7,
            "uid": f"u{index // 2}_0_{index % 2}",
            "acc": index % 2 == 1,
            "pred": str(index),
        }
        for index in range(4)
    ]
    return json_lines(folder / "7.jsonl", rows)


def open_instruct(folder: Path) -> Path:
    json_lines(
        folder / "run_metadata.jsonl",
        [{"run_name": "run", "git_commit": "c0ffee", "model_name": "m", "timestamp": "2026"}],
    )
    rows = [
        {
            "step": 3,
            "sample_idx": index,
            "prompt_idx": index // 2,
            "prompt_tokens": ids("Question"),
            "response_tokens": [*ids(f"Answer {index}"), 256],
            "reward": index / 2,
            "advantage": index / 2 - 0.25,
            "finish_reason": "stop" if index else "length",
            "dataset": "math",
            "ground_truth": [1, 2],
            "request_info": {"num_calls": 0},
            "logprobs": [-0.5] * 9,
        }
        for index in range(4)
    ]
    json_lines(folder / "run_rollouts_000000.jsonl", rows)
    return folder


def prime_rl(folder: Path, *, with_tokens: bool = True) -> Path:
    """Episodes as verifiers 0.4 records them: a graph of messages with the tokens that each adds."""

    def node(parent: int | None, role: str, text: str, *, sampled: bool = False) -> dict[str, Any]:
        scaffold = ids("<a>") if sampled else []
        tokens = scaffold + ids(text)
        made = {
            "semantic_parents": [],
            "message": {"role": role, "content": text},
            "sampled": sampled,
            "timestamp": 1.0,
            "token_ids": tokens if with_tokens else [],
            "mask": [False] * len(scaffold) + [sampled] * len(text) if with_tokens else [],
            "is_content": [],
            "logprobs": [-0.25] * len(text) if sampled and with_tokens else [],
        }
        return made if parent is None else {"parent": parent, **made}

    def episode(number: int, traces: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"e{number}",
            "env": {"id": "env"},
            "task": {"type": "Task", "data": {"question": f"q{number}"}},
            "ok": bool(traces),
            "is_timeout": False,
            "errors": [],
            "traces": traces,
        }

    def trace(nodes: list[dict[str, Any]], score: float) -> dict[str, Any]:
        return {
            "version": 1,
            "id": "t",
            "task": {"type": "Task", "data": {"question": "q"}},
            "nodes": nodes,
            "rewards": {
                "correct": {"score": score, "weight": 2.0},
                "late": {"score": 1.0, "weight": 0.5},
            },
            "metrics": {"turns": 1.0},
            "stop_condition": "done",
        }

    straight = [node(None, "user", "Hi"), node(0, "assistant", "Hello", sampled=True)]
    forked = [
        node(None, "user", "Go"),
        node(0, "assistant", "left", sampled=True),
        node(0, "assistant", "right", sampled=True),
        node(1, "tool", "result"),
    ]
    rows = [
        episode(0, [trace(straight, 1.0)]),
        episode(1, [trace(forked, 0.0)]),
        episode(2, []),
    ]
    return json_lines(folder / "rollouts" / "step_5" / "train" / "all" / "traces.jsonl", rows)


def lm_eval(folder: Path) -> Path:
    def row(number: int, responses: list[list[Any]], score: float) -> dict[str, Any]:
        return {
            "doc_id": number,
            "doc": {"question": f"q{number}"},
            "target": str(number),
            "arguments": {"gen_args_0": {"arg_0": f"Q: q{number}\nA:", "arg_1": {"until": ["\n"]}}},
            "resps": responses,
            "filtered_resps": [str(number)],
            "filter": "strict-match",
            "metrics": ["exact_match"],
            "doc_hash": "a",
            "prompt_hash": "b",
            "target_hash": "c",
            "exact_match": score,
        }

    rows = [
        row(0, [[" 0"]], 1.0),
        row(1, [[" 7"]], 0.0),
        row(2, [["-1.5", "False"], ["-2.5", "True"]], 1.0),
    ]
    rows[2]["resps"] = [[[-1.5, False]], [[-2.5, True]]]
    return json_lines(folder / "samples_gsm8k_2026-11-29T00-00-00.jsonl", rows)

"""A reward manager with verl's interface commits every rollout. verl itself is not installed here: these are stand-ins."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quark.errors import ConfigError
from quark.integrations.verl import with_pool
from quark.pool.native import NativePool
from tests.interchange.foreign_files import ids
from tests.tiny import byte_tokenizer


class Manager:
    """As ``RewardManagerBase`` and ``NaiveRewardManager`` of verl's reward loop."""

    def __init__(self, config: object, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.num_calls = 0

    async def run_single(self, data: Any) -> dict[str, Any]:
        self.num_calls += 1
        await asyncio.sleep(0)
        mask = data[0].batch["attention_mask"]
        score = float(mask[-len(data[0].batch["responses"]) :].sum())
        return {"reward_score": score, "reward_extra_info": {"acc": np.float32(score), "pred": "x"}}


class Data(list[Any]):
    """As ``DataProto``: a batch of one, with padding on the outer sides."""

    def __init__(self, prompt: str, response: str, step: int) -> None:
        left, right = [256] * (8 - len(prompt)), [256] * (8 - len(response))
        item = SimpleNamespace(
            batch={
                "prompts": np.array(left + ids(prompt)),
                "responses": np.array(ids(response) + right),
                "attention_mask": np.array(
                    [0] * len(left) + [1] * (len(prompt) + len(response)) + [0] * len(right)
                ),
            },
            non_tensor_batch={"data_source": "math", "reward_model": {"ground_truth": "4"}},
        )
        super().__init__([item])
        self.meta_info = {"global_steps": step}


def answers(manager: Any, *data: Data) -> list[dict[str, Any]]:
    async def ask() -> list[dict[str, Any]]:
        return await asyncio.gather(*map(manager.run_single, data))

    return asyncio.run(ask())


def test_rollouts_of_verl_are_committed_and_replayed(tmp_path: Path) -> None:
    kind = with_pool(Manager, pool=tmp_path / "pools", resume="replay")
    assert kind.__name__ == "PoolManager"
    rollouts = [Data("2+2", "4", 7), Data("2+2", "four", 7), Data("2+2", "4", 8)]
    first = kind(None, tokenizer=byte_tokenizer())
    given = answers(first, *rollouts)
    assert [answer["reward_score"] for answer in given] == [1.0, 4.0, 1.0]
    other = kind(None, tokenizer=byte_tokenizer())
    assert other._sink.path == tmp_path / "pools" / "1", "another worker has a pool of its own"
    first._sink.close()
    again = kind(None, tokenizer=byte_tokenizer())
    assert again._sink.path == tmp_path / "pools" / "0"
    assert answers(again, *rollouts) == given
    assert (first.num_calls, again.num_calls) == (3, 0)
    with NativePool.open(tmp_path / "pools" / "0") as pool:
        rows = pool.scan().sort("round", "completion_text").collect().to_dicts()
    assert [(r["round"], r["completion_text"], r["reward"]) for r in rows] == [
        (7, "4", 1.0),
        (7, "four", 4.0),
        (8, "4", 1.0),
    ]
    assert rows[1]["completion_tokens"] == ids("four")
    assert rows[1]["prompt_tokens"] == ids("2+2")


def test_notes_that_a_pool_does_not_keep_stop_no_training(tmp_path: Path) -> None:
    class Noting(Manager):
        notes: dict[str, Any]

        async def run_single(self, data: Any) -> dict[str, Any]:
            return {**await super().run_single(data), "reward_extra_info": self.notes}

    manager = with_pool(Noting, pool=tmp_path / "pools", resume="replay")(None, byte_tokenizer())
    notes = {"array": np.arange(3), "half": "\ud800", "digits": 10**400, "nan": float("nan")}
    for step, kept in enumerate((notes, {"text": "x" * (1 << 20)})):
        manager.notes = kept
        answers(manager, Data("2+2", "4", step))
    again = answers(manager, Data("2+2", "4", 0), Data("2+2", "4", 1))
    assert manager.num_calls == 2
    said = {"array": [0, 1, 2], "half": "?", "digits": str(10**400), "nan": None}
    assert [answer["reward_extra_info"] for answer in again] == [said, {}]
    manager._sink.close()


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pools").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        with_pool(Manager, pool=tmp_path / "pools")(None, byte_tokenizer())

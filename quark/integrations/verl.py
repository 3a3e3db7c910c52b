"""A reward manager of verl that keeps every rollout in a pool.

    # my_manager.py, named by verl's reward manager settings (source "importlib", its path and its name)
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from quark.integrations.verl import with_pool

    RewardManager = with_pool(NaiveRewardManager, pool="runs/rollouts")

verl is not imported: the class that is wrapped brings it along. The interface is that of verl's reward loop: an object
with ``tokenizer`` whose ``run_single(data)`` gives ``{"reward_score": ..., "reward_extra_info": {...}}``.
"""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

from quark.errors import ConfigError, PoolLockedError
from quark.formats import plain_json
from quark.integrations.sink import Resume, Rollout, RolloutSink

_REWARD = "reward_score"


def with_pool(manager: type[Any], *, pool: str | Path, resume: Resume | None = None) -> type[Any]:
    """A subclass of a reward manager that commits every rollout before it returns its score.

    Prompt and response ids are stored as verl has them, without padding. verl scores in several processes: each takes the first pool of ``POOL/0``,
    ``POOL/1``, ... that nobody writes; ``quark pool merge`` makes one of them.

    Args:
        manager: A class with verl's ``RewardManagerBase`` interface.
        pool: A folder for the pools; made if it is not there.
        resume: ``"replay"`` answers from this process's pool what it has scored at the same step.

    Raises:
        ConfigError: As the manager is made, where ``pool`` is a file.
    """

    class PoolRewardManager(manager):  # type: ignore[misc]
        """``manager`` with a pool."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401 - of verl
            super().__init__(*arguments, **settings)
            self._sink = _free_sink(Path(pool), self.tokenizer, resume)

        async def run_single(self, data: Any) -> dict[str, Any]:  # noqa: ANN401 - verl's DataProto
            """Score one rollout, and commit it."""
            rollout, step = _rollout(data, self.tokenizer)
            asked = await asyncio.to_thread(self._sink.ask, [rollout], step=step)
            if not asked.missing:
                reward = asked.scores[_REWARD][0]
                result: dict[str, Any] = {
                    _REWARD: float("nan") if reward is None else reward,
                    "reward_extra_info": asked.notes[0] or {},
                }
                return result
            result = await super().run_single(data)
            scores = {_REWARD: [float(result[_REWARD])]}
            notes = plain_json(result.get("reward_extra_info") or {})
            await asyncio.to_thread(self._sink.commit, asked, scores, notes=notes)
            return result

    PoolRewardManager.__name__ = PoolRewardManager.__qualname__ = f"Pool{manager.__name__}"
    return PoolRewardManager


def _free_sink(folder: Path, tokenizer: Any, resume: Resume | None) -> RolloutSink:  # noqa: ANN401
    """The first pool of the folder that no other process writes.

    Raises:
        ConfigError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: pools of verl's processes lie in one")
    for number in count():
        try:
            return RolloutSink(
                folder / str(number),
                tokenizer=tokenizer,
                names=[_REWARD],
                weights={},
                source={"trainer": "verl", "tokens": "given"},
                resume=resume,
            )
        except (PoolLockedError, FileExistsError):  # another process has it, or has just made it
            continue
    raise AssertionError


def _rollout(data: Any, tokenizer: Any) -> tuple[Rollout, int]:  # noqa: ANN401 - verl's DataProto
    """The one rollout of ``data``, and the trainer's step."""
    item = data[0]
    prompts, responses = item.batch["prompts"], item.batch["responses"]
    mask = item.batch["attention_mask"]
    size = responses.shape[-1]
    prompt = [int(t) for t, kept in zip(prompts, mask[:-size], strict=True) if kept]
    response = [int(t) for t, kept in zip(responses, mask[-size:], strict=True) if kept]
    source = item.non_tensor_batch.get("data_source")
    truth = (item.non_tensor_batch.get("reward_model") or {}).get("ground_truth")
    rollout = Rollout(
        prompt_text=tokenizer.decode(prompt, skip_special_tokens=True),
        prompt_tokens=prompt,
        completion_text=tokenizer.decode(response, skip_special_tokens=True),
        completion_tokens=response,
        prompt_metadata={"data_source": source, "ground_truth": truth},
    )
    meta = getattr(data, "meta_info", None) or {}
    return rollout, int(meta.get("global_steps") or 0)

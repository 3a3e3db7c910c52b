"""Reward functions of TRL that keep every rollout in a pool.

    trainer = GRPOTrainer(..., reward_funcs=PoolRewards([accuracy, style], pool="runs/rollouts", tokenizer=tokenizer))

TRL is not imported: what it calls is plain Python.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark.errors import ConfigError
from quark.integrations.sink import Resume, Rollout, RolloutSink, Scores

RewardFunction = Callable[..., Any]
"""What TRL calls with ``prompts``, ``completions``, ``completion_ids`` and the columns of the data set."""
_PASSED_ON = ("trainer_state", "log_extra", "log_metric", "environments")
"""Arguments that are no columns of the data set."""


class PoolRewards(list[RewardFunction]):
    """A list of reward functions for ``reward_funcs`` that commits every rollout before TRL trains on it.

    Each function keeps its name, its place and its metric in TRL. The first one that TRL asks for a batch runs all of
    them and commits: prompt, completion, token ids, the step, all scores and the columns of the data set. On return the
    rollouts survive a power cut. The column ``reward`` holds the weighted sum, and each function has a column of its own.

    TRL passes completion ids, which are stored as they are, and no prompt ids, which the tokenizer makes.

    With several processes each one writes a pool of its own, named ``POOL.0``, ``POOL.1``, ...; ``quark pool merge``
    makes one of them.

    Args:
        reward_funcs: One function or several, ``async`` ones too. Reward models are no functions: call them in one.
        pool: The pool; made if it is not there.
        tokenizer: Of the policy.
        weights: TRL's ``reward_weights``, if it has any.
        resume: ``"replay"`` answers from the pool what it has scored at the same step, so that a run that continues
            from a checkpoint calls no function twice for one rollout. None calls the functions again.

    Raises:
        ConfigError: Something is not a function, or two functions have one name.
        PoolError, OSError: Of the pool.

    >>> GRPOTrainer(..., reward_funcs=PoolRewards(accuracy, pool="rollouts", tokenizer=tokenizer))  # doctest: +SKIP
    """

    def __init__(
        self,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        *,
        pool: str | Path,
        tokenizer: Any,  # noqa: ANN401 - of transformers
        weights: Sequence[float] | None = None,
        resume: Resume | None = None,
    ) -> None:
        functions = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
        names = [_name_of(function) for function in functions]
        if weights is not None and len(weights) != len(functions):
            raise ConfigError(f"there are {len(weights)} weights for {len(functions)} functions")
        self._functions = functions
        self._names = names
        self._tokenizer = tokenizer
        self._prompts: dict[str, tuple[str, list[int]]] = {}
        self._last: _Scored | None = None
        self.sink = RolloutSink(
            _of_process(Path(pool)),
            tokenizer=tokenizer,
            names=names,
            weights=dict(zip(names, weights or [1.0] * len(names), strict=True)),
            source={
                "trainer": "trl",
                "rewards": ", ".join(names),
                "prompt_tokens": "recomputed",
                "completion_tokens": "given",
            },
            resume=resume,
        )
        super().__init__(_Member(self, name) for name in names)

    def scores_of(
        self,
        name: str,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        arguments: Mapping[str, Any],
    ) -> list[float | None]:
        """The scores of one function for a batch; the first call for a batch scores and commits it."""
        last = self._last
        if last is None or last.completion_ids is not completion_ids:
            scores = self._score(prompts, completions, completion_ids, arguments)
            self._last = last = _Scored(completion_ids, scores)
        return list(last.scores[name])

    def _score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        arguments: Mapping[str, Any],
    ) -> Scores:
        count = len(prompts)
        columns = {
            name: values
            for name, values in arguments.items()
            if name not in _PASSED_ON and isinstance(values, list) and len(values) == count
        }
        rollouts = []
        for at in range(count):
            text, tokens = self._prompt(prompts[at])
            rollouts.append(
                Rollout(
                    prompt_text=text,
                    prompt_tokens=tokens,
                    completion_text=self._text(completions[at], completion_ids[at]),
                    completion_tokens=[int(token) for token in completion_ids[at]],
                    prompt_metadata={name: values[at] for name, values in columns.items()},
                )
            )
        state = arguments.get("trainer_state")

        def score(positions: Sequence[int]) -> Scores:
            def some(values: Sequence[Any]) -> list[Any]:
                return [values[at] for at in positions]

            passed = {n: some(v) if n in columns else v for n, v in arguments.items()}
            return self._ask(
                prompts=some(prompts),
                completions=some(completions),
                completion_ids=some(completion_ids),
                **passed,
            )

        return self.sink.scores(
            rollouts, step=0 if state is None else int(state.global_step), score=score
        )

    def _ask(self, **arguments: Any) -> Scores:  # noqa: ANN401 - as TRL passes them
        waiting = {}
        scores: dict[str, Sequence[float | None]] = {}
        for name, function in zip(self._names, self._functions, strict=True):
            if _is_async(function):
                waiting[name] = function
            else:
                scores[name] = function(**arguments)
        if waiting:

            async def ask_all() -> list[Sequence[float | None]]:
                return list(await asyncio.gather(*(f(**arguments) for f in waiting.values())))

            scores.update(zip(waiting, asyncio.run(ask_all()), strict=True))
        return scores

    def _prompt(self, prompt: Any) -> tuple[str, list[int]]:  # noqa: ANN401 - a text or messages
        key = prompt if isinstance(prompt, str) else repr(prompt)
        if key not in self._prompts:
            if len(self._prompts) >= 4096:
                self._prompts.clear()
            is_text = isinstance(prompt, str)
            text = (
                prompt
                if is_text
                else self._tokenizer.apply_chat_template(
                    prompt, tokenize=False, add_generation_prompt=True
                )
            )
            tokens = self._tokenizer.encode(text, add_special_tokens=is_text)
            self._prompts[key] = (text, tokens)
        return self._prompts[key]

    def _text(self, completion: Any, ids: Sequence[int]) -> str:  # noqa: ANN401 - as above
        if isinstance(completion, str):
            return completion
        if len(completion) == 1 and isinstance(completion[0].get("content"), str):
            return str(completion[0]["content"])
        return str(self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class _Scored:
    """The batch that was scored last."""

    completion_ids: Sequence[Sequence[int]]
    """TRL gives every function the same object."""
    scores: Scores


class _Member:
    """One function of the list, as TRL sees it."""

    def __init__(self, owner: PoolRewards, name: str) -> None:
        self._owner = owner
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **arguments: Any,  # noqa: ANN401 - as TRL passes them
    ) -> list[float | None]:
        """Scores of a batch."""
        return self._owner.scores_of(self.__name__, prompts, completions, completion_ids, arguments)


def _name_of(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    if not callable(function) or hasattr(function, "parameters"):
        raise ConfigError(
            f"{type(function).__name__} is not a function: call the reward model in a function of your own"
        )
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: Any) -> bool:  # noqa: ANN401 - a callable
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - of a class with an async __call__
    )


def _of_process(path: Path) -> Path:
    """The pool of this process; with several, each has its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return path
    return path.with_name(f"{path.name}.{os.environ.get('RANK', '0')}")

"""A time limit for reward functions.

The function runs in a thread of quark's own process. A thread, because the function may hold
resources that processes cannot share: a model on a GPU, an open connection, state between calls. A
thread cannot be killed from outside, so a call that takes too long is *abandoned*: it continues in
the background, its result is ignored, and it ends with the process at the latest. Where calls keep
hanging no more are begun.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from quark.errors import RewardError
from quark.rewards.base import RewardFunction
from quark.rewards.fields import FieldsAsked, call_with, fields_asked
from quark.types import Json

MAX_ABANDONED = 4
"""Maximum number of abandoned calls that still run."""


class TimeLimited:
    """Calls ``reward`` and waits for ``timeout_s`` seconds at most.

    Every call has its own thread, so the function must not depend on its thread (an SQLite
    connection does; torch may use another number of threads there).
    """

    def __init__(self, reward: RewardFunction, timeout_s: float) -> None:
        self._reward = reward
        self._timeout_s = timeout_s
        self._abandoned: list[threading.Thread] = []

    @property
    def name(self) -> str:
        """The name of the wrapped reward."""
        return self._reward.name

    @property
    def provenance(self) -> Mapping[str, Json]:
        """Identity of the wrapped reward: a limit changes no score."""
        details: Mapping[str, Json] = getattr(self._reward, "provenance", {})
        return details

    @property
    def fields_asked(self) -> FieldsAsked:
        """Of the wrapped reward."""
        return fields_asked(self._reward)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **fields: Sequence[Json]
    ) -> Sequence[float | None]:
        """Score one batch.

        Raises:
            TimeoutError: There are no scores in time.
            RewardError: Too many earlier calls still hang.
        """
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= MAX_ABANDONED:
            raise RewardError(
                f"{len(self._abandoned)} calls of reward {self.name!r} have been hanging for more than "
                f"{self._timeout_s:g} s, so no new call is started"
            )
        returned: list[Sequence[float | None]] = []
        raised: list[BaseException] = []

        def call() -> None:
            try:
                returned.append(call_with(self._reward, prompts, completions, fields))
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=call, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if raised:
            raise raised[0]
        if not returned:
            self._abandoned.append(thread)
            raise TimeoutError(f"no scores after {self._timeout_s:g} s (reward.timeout_s)")
        return returned[0]

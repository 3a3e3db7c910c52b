"""Running a causal LM so that only chosen positions are projected on the vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from quark.models.batch import ModelInputs, TrainingBatch
from quark.models.running import Running, try_running


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRows:
    """The M positions that predict a batch's completion tokens, not yet projected on the vocabulary."""

    rows: Tensor
    """[M, D] last hidden states (for models whose head is more than a projection: logits [M, V])."""
    head: Callable[[Tensor], Tensor]
    """Rows [m, D] to logits [m, V]."""
    parameters: tuple[nn.Parameter, ...]
    """The trainable parameters that ``head`` reads."""

    def part(self, rows: slice) -> CompletionRows:
        """Some of the positions."""
        return replace(self, rows=self.rows[rows])


SHORT_SEQUENCE = 64
"""Up to this length, plain attention is faster forward and back on a CPU: 3.3 times at 16 tokens,
1.5 at 64. At 128 the fused kernel is equally fast."""


def attention_for(device: torch.device, length: int) -> AbstractContextManager[None]:
    """Plain attention for short sequences on a CPU, where the fused kernel has a slow backward pass.

    The choice is made in the forward pass; the backward pass follows it.
    """
    if device.type == "cpu" and length <= SHORT_SEQUENCE:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class CompletionModel(Protocol):
    """Anything that predicts the completion tokens of a batch: the policy or a reference."""

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """The M rows that predict the completion tokens of ``batch``, sequence after sequence."""
        ...


class Body(nn.Module):
    """A causal LM up to the rows that are projected on the vocabulary, as one module.

    Args:
        model: the model.
        has_head: whether the rows are its logits.
    """

    def __init__(self, model: PreTrainedModel, *, has_head: bool) -> None:
        super().__init__()
        self.model = model
        self._has_head = has_head

    def forward(self, token_positions: Tensor, **arguments: Any) -> Tensor:  # noqa: ANN401 - what the library's models take
        """Rows [M, D], or logits [M, V], at M flat positions in [B, L]."""
        rows: Tensor
        if self._has_head:
            rows = self.model(**arguments).logits
        else:
            rows = self.model.base_model(**arguments).last_hidden_state
        return rows.flatten(0, 1).index_select(0, token_positions)


class CausalModel:
    """A causal LM of transformers, with its body and its vocabulary head used separately if that is exact.

    Some architectures do more to the logits than the head does (soft caps, scaling). A numeric test
    decides once whether the split is exact. If it is not, the whole model is run instead.

    Args:
        model: the model.
        num_leading_positions: positions at the start that only a reward token takes: inputs without
            one begin after them.
        running: how it can be run; None tries it.

    Raises:
        ModelError: the model cannot be run, or is not causal.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_leading_positions: int = 0,
        running: Running | None = None,
    ) -> None:
        self.model = model
        self.num_leading_positions = num_leading_positions
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        self._head: nn.Module | None = model.get_output_embeddings()
        if self._head is None or not self._head_is_exact():
            self._head = None
        self.body = Body(model, has_head=self._head is None)
        self._stepped = model if self._head is None else model.base_model
        self._cache_name = _cache_name(self._stepped)
        self.running = try_running(self) if running is None else running

    @property
    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """Trainable parameters of the vocabulary head, if it is run separately."""
        if self._head is None:
            return ()
        return tuple(p for p in self._head.parameters() if p.requires_grad)

    @property
    def head_dtype(self) -> torch.dtype | None:
        """The vocabulary head's weights; None if it is not run separately."""
        return None if self._head is None else next(self._head.parameters()).dtype

    def head(self, rows: Tensor) -> Tensor:
        """Logits [m, V] of rows that this model made."""
        if self._head is None:
            return rows
        logits: Tensor = self._head(rows)
        return logits

    def positions(self, attention_mask: Tensor, *, is_conditioned: bool) -> Tensor:
        """Position ids [B, L]: each row counts from its first real token."""
        start = 0 if is_conditioned else self.num_leading_positions
        return (attention_mask.cumsum(-1) - 1).clamp_(min=0) + start

    def run(self, inputs: ModelInputs) -> CompletionRows:
        """The rows that predict the completion tokens; differentiable."""
        if not self.running.masks_padding:
            inputs = inputs.from_the_first_column()
        arguments = self._arguments(
            inputs.input_ids, inputs.attention_mask, is_conditioned=inputs.is_conditioned
        )
        with attention_for(inputs.input_ids.device, inputs.input_ids.shape[1]):
            rows = self.body(inputs.token_positions, **arguments)
        return CompletionRows(rows=rows, head=self.head, parameters=self.head_parameters)

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, *, is_conditioned: bool = False
    ) -> Tensor:
        """Logits [B, L, V] of texts, which begin with a reward token if they are conditioned, by one pass."""
        arguments = self._arguments(input_ids, attention_mask, is_conditioned=is_conditioned)
        with attention_for(input_ids.device, input_ids.shape[1]):
            output = self.model(**arguments)
        logits: Tensor = output.logits
        return logits

    def _arguments(
        self, input_ids: Tensor, attention_mask: Tensor, *, is_conditioned: bool
    ) -> dict[str, Any]:
        """What a pass without a cache takes."""
        arguments: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": False,
        }
        if self._takes_positions:
            arguments["position_ids"] = self.positions(
                attention_mask, is_conditioned=is_conditioned
            )
        return arguments

    def next_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Any = None,  # noqa: ANN401 - every architecture brings its own cache class
    ) -> tuple[Tensor, Any]:
        """Logits [B, V] after the last column, and the cache to hand in with the next column.

        The cache is None if the model has none that works; then pass all columns again.
        """
        return self.step(input_ids, attention_mask, position_ids, cache, running=self.running)

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Any = None,  # noqa: ANN401 - see above
        *,
        running: Running,
    ) -> tuple[Tensor, Any]:
        """As ``next_logits``, run as ``running`` says."""
        arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": running.has_cache}
        if cache is None or running.masks_steps:
            arguments["attention_mask"] = attention_mask
        if self._takes_positions:
            arguments["position_ids"] = position_ids
        if cache is not None:
            arguments[self._cache_name] = cache
        if self._head is None and self._takes_logits_to_keep:
            arguments["logits_to_keep"] = 1
        output = self._stepped(**arguments)
        if self._head is None:
            logits: Tensor = output.logits[:, -1]
        else:
            logits = self._head(output.last_hidden_state[:, -1])
        return logits, getattr(output, self._cache_name, None) if running.has_cache else None

    @torch.no_grad()
    def _head_is_exact(self) -> bool:
        """Whether head(body(x)) equals model(x) on a few tokens."""
        body = self.model.base_model
        if body is self.model:
            return False
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(4, device=self.model.device).unsqueeze(0)
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
        }
        try:
            whole = self.model(**arguments).logits
            apart = self.head(body(**arguments).last_hidden_state)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            return False  # a model that does not run at all is refused by ``try_running``
        finally:
            self.model.train(was_training)
        return apart.shape == whole.shape and torch.allclose(apart, whole, rtol=1e-4, atol=1e-4)


_CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""The names that models give to their caches. transformers renamed the usual ones to ``cache`` in 5.24."""


def _cache_name(model: nn.Module) -> str:
    """The argument and output of ``model`` that hold its cache."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_NAMES if name in accepted), _CACHE_NAMES[0])

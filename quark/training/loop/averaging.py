"""A moving average of the weights: for Elastic Reset, for sampling, or as a reference that follows the policy.

    every update:   average <- decay * average + (1 - decay) * policy
    every reset:    policy  <- average
                    average <- original model

A reset falls between two rounds (Noukhovitch et al. 2023). The average as a reference is the synchronization of
TR-DPO (Gorbatovski et al. 2024), which mixes a share of the policy into the reference at a fixed interval of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from quark.config.schema import AverageSection, RunSection
from quark.errors import CheckpointError
from quark.evaluation.evaluator import Evaluation
from quark.formats import number_in, object_in, text_in, whole_in
from quark.models.policy import Policy
from quark.reference.averaged import AveragedReference
from quark.training.loop.hooks import WeightHook
from quark.training.loop.journal import Journal
from quark.training.loop.round_samples import RoundSamples
from quark.training.processes.process_group import ProcessGroup, checksum
from quark.training.processes.shards import copy_full, first_local_row, local_shard
from quark.training.processes.weights import Weights
from quark.types import Json


class WeightAverage(WeightHook):
    """Averages the trained weights in float32, by the names of the parameters.

    The vectors of the reward tokens did not exist in the original model, so a reset keeps those of the policy.

    Args:
        policy: as the run begins, with untrained weights.
        weights: where they lie among the processes.
        processes: of the run.
        section: what the average is for.
        run: the shape of the run.
        journal: gets a row for each reset.
        measure: evaluates the policy under the best token on held-out prompts; for all processes together.
    """

    name = "average"

    def __init__(
        self,
        policy: Policy,
        *,
        weights: Weights,
        processes: ProcessGroup,
        section: AverageSection,
        run: RunSection,
        journal: Journal,
        measure: Callable[[], Evaluation],
    ) -> None:
        self._section = section
        self._decay = section.decay_in(run.steps_per_round)
        self._steps_per_round = run.steps_per_round
        self._is_sharded = weights.is_sharded
        self._processes = processes
        self._journal = journal
        self._measure = measure
        self._parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        self._kept_rows = _reward_token_rows(policy)
        self._average = {
            name: parameter.detach().clone().float() for name, parameter in self._parameters.items()
        }
        self._policy = policy
        self._initial = (
            {name: local_shard(p.detach()).cpu().clone() for name, p in self._parameters.items()}
            if section.reset_every_rounds is not None
            else {}
        )
        self._initial_digest = self._digest()
        self._num_resets = 0
        self._last_reset = 0  # its round
        self._updates = 0  # since that reset
        self._awaited: dict[
            str, float
        ] = {}  # reward before the last reset, until it is reached again

    def reference(self) -> AveragedReference:
        """The average as the anchor of the KL penalty."""
        return AveragedReference(self._policy, self._average)

    def on_start(self, samples: RoundSamples) -> None:  # noqa: ARG002 - of no interest here
        """Say what is averaged and how, and begin from tokens that were settled."""
        if self._journal.position.step == 0:
            self._keep_rows()
        section = self._section
        said = f"average of the weights: decay {self._decay:.6g} every {section.update_every_steps} steps"
        if section.reset_every_rounds is not None:
            updates = section.updates_per_reset(self._steps_per_round)
            said += (
                f"; every {section.reset_every_rounds} rounds the policy is reset to it, when the original model has "
                f"weight {self._decay**updates:.3g} in it"
            )
        self._journal.say(said)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the average towards the policy where an update is due."""
        if (step + 1) % self._section.update_every_steps:
            return
        for name, parameter in self._parameters.items():
            average = local_shard(self._average[name])
            average.lerp_(local_shard(parameter.detach()).float(), 1.0 - self._decay)
        self._updates += 1

    def before_exploration(self, round: int) -> None:
        """Reset the policy where that is due, and log what it costs."""
        every = self._section.reset_every_rounds
        if every is None or round == 0 or round % every or round == self._last_reset:
            return
        before = self._measure()
        distances = {
            "distance_to_original": self._distance(self._parameters),
            "distance_of_average_to_original": self._distance(self._average),
        }
        self._reset()
        after = self._measure()
        self._num_resets += 1
        self._last_reset = round
        reward = before.metrics["reward_mean"]
        self._awaited = {"reward": reward, "step": self._journal.position.step}
        self._journal.write(
            "reset",
            number=self._num_resets,
            weight_of_original=self._decay**self._updates,
            reward_before=reward,
            reward_after=after.metrics["reward_mean"],
            kl_before=before.metrics["kl_sampled_per_completion"],
            kl_after=after.metrics["kl_sampled_per_completion"],
            **distances,
        )
        self._updates = 0

    def after_evaluation(self, evaluation: Evaluation) -> None:
        """Log that the reward from before the last reset is reached again."""
        if self._awaited and evaluation.metrics["reward_mean"] >= self._awaited["reward"]:
            steps = self._journal.position.step - self._awaited["step"]
            self._awaited = {}
            self._journal.write(
                "recovery",
                number=self._num_resets,
                steps=int(steps),
                rounds=self._journal.round + 1 - self._last_reset,
                reward=evaluation.metrics["reward_mean"],
                kl=evaluation.metrics["kl_sampled_per_completion"],
            )

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within: the policy has the average weights, where those are what is sampled."""
        if self._section.samples == "policy":
            yield
            return
        kept = {n: local_shard(p.detach()).clone() for n, p in self._parameters.items()}
        self._copy_to_policy(self._average)
        try:
            yield
        finally:
            for name, value in kept.items():
                local_shard(self._parameters[name].detach()).copy_(value)

    def state(self) -> Mapping[str, Json]:
        """The counters, and a checksum of the original weights."""
        return {
            "num_resets": self._num_resets,
            "last_reset": self._last_reset,
            "updates": self._updates,
            "awaited": dict(self._awaited),
            "original": self._initial_digest,
        }

    def load(self, state: Mapping[str, Json]) -> None:
        """Take up the counters.

        Raises:
            CheckpointError: the original model is another one than the run began with.
        """
        if text_in(state["original"]) != self._initial_digest:
            raise CheckpointError(
                "the original model is not the one that this run began with, and resets would lead to it: bring that "
                "model back, or choose another --run-dir"
            )
        self._num_resets = whole_in(state["num_resets"])
        self._last_reset = whole_in(state["last_reset"])
        self._updates = whole_in(state["updates"])
        awaited = object_in(state["awaited"])
        self._awaited = {name: number_in(value) for name, value in awaited.items()}

    def tensors(self) -> Mapping[str, Tensor]:
        """The average, by the names of the parameters."""
        return self._average

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up an average that ``tensors`` gave. Raises KeyError where a parameter is missing."""
        for name, average in self._average.items():
            copy_full(average, tensors[name])

    @torch.no_grad()
    def _reset(self) -> None:
        self._keep_rows()
        self._copy_to_policy(self._average)
        for name, average in self._average.items():
            local_shard(average).copy_(self._initial[name])
        self._keep_rows()

    @torch.no_grad()
    def _keep_rows(self) -> None:
        """Give the average the policy's rows of the reward tokens."""
        for name, rows in self._kept_rows.items():
            policys = _local_part(self._parameters[name].detach(), rows)
            _local_part(self._average[name], rows).copy_(policys)

    def _copy_to_policy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            local_shard(parameter.detach()).copy_(local_shard(tensors[name]))

    def _distance(self, tensors: Mapping[str, Tensor]) -> float:
        """Euclidean distance to the original weights."""
        square = 0.0
        for name, value in tensors.items():
            difference = local_shard(value.detach()).float().cpu() - self._initial[name].float()
            square += float(difference.square().sum(dtype=torch.float64))
        if self._is_sharded:
            square = self._processes.sums({"square": square})["square"]
        return math.sqrt(square)

    def _digest(self) -> str:
        sums = [checksum(local_shard(p.detach())) % 2**64 for p in self._parameters.values()]
        if self._is_sharded:
            sums = [sum(parts) % 2**64 for parts in zip(*self._processes.gather(sums), strict=True)]
        total = sum((place + 1) * value for place, value in enumerate(sums)) % 2**64
        return f"{total:016x}"


def _reward_token_rows(policy: Policy) -> dict[str, slice]:
    """By parameter, the rows that belong to reward tokens, in the vocabulary head, too; empty without such tokens."""
    if not policy.reward_tokens.are_placed:
        return {}
    matrix, rows = policy.reward_matrix
    ids = policy.reward_tokens.ids
    found = {id(matrix): rows}
    head = policy.model.get_output_embeddings()
    if head is not None:
        for parameter in head.parameters():
            found.setdefault(id(parameter), slice(ids[0], ids[-1] + 1))
    return {
        name: found[id(parameter)]
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad and id(parameter) in found
    }


def _local_part(tensor: Tensor, rows: slice) -> Tensor:
    """What this process holds of some rows: a view."""
    first, local = first_local_row(tensor), local_shard(tensor)
    start, stop, _ = rows.indices(len(tensor))
    return local[max(start - first, 0) : max(stop - first, 0)]

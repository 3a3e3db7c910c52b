"""Makes generators: models of this process, or a server that loads their weights."""

from __future__ import annotations

from dataclasses import dataclass

from quark.errors import ConfigError
from quark.generation.base import Generator, SamplingConfig
from quark.generation.completion_server import CompletionServer
from quark.generation.http_generator import HttpGenerator
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.policy import Policy
from quark.reference.base import ReferencePolicy
from quark.training.context import RunContext
from quark.training.processes.data_parallel import DataParallelGenerator, MainProcessGenerator
from quark.training.processes.weights import Weights
from quark.training.state.published import PublishedWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The server that samples, and the weights published for it."""

    server: CompletionServer
    weights: PublishedWeights


def make_serving(context: RunContext) -> Serving | None:
    """The server with the initial weights; None without a server, and in processes other than the main process.

    Raises:
        ConfigError: the server could not answer as the model does.
        ModelError: the weights cannot be written.
    """
    config, weights = context.config, context.weights
    if config.sampling.backend != "http":
        return None
    with weights.gathered():
        if not context.processes.is_main_process:
            return None
        policy = weights.local_policy
        if policy.num_leading_positions:
            raise ConfigError(
                'sampling.backend = "http" with a model that has absolute positions: a server counts them '
                "from 0, so set model.shift_positions = false"
            )
        return Serving(
            server=CompletionServer(config.sampling.http, say=context.listener.on_message),
            weights=PublishedWeights(context.directory.served, policy),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generators:
    """Makes generators of the original model and of the policy."""

    context: RunContext
    serving: Serving | None

    def original(self, sampling: SamplingConfig) -> Generator:
        """Samples from p0."""
        return self._of(self.context.reference, sampling)

    def policy(self, sampling: SamplingConfig) -> Generator:
        """Samples from the policy."""
        return self._of(self.context.weights, sampling)

    def _of(self, model: Weights | ReferencePolicy, sampling: SamplingConfig) -> Generator:
        context, policy = self.context, self.context.policy
        local = model.local_policy if isinstance(model, Weights) else model
        if context.config.sampling.backend == "http":
            served = None if self.serving is None else self._served(self.serving, local, sampling)
            return MainProcessGenerator(served, context.processes, model.gathered)
        sampler = TransformersGenerator(
            local.causal,
            policy.tokenizer,
            policy.reward_tokens,
            sampling,
            context.device,
            critics=policy.critics,
        )
        within = model.gathered_for_sampling if isinstance(model, Weights) else model.gathered
        return (
            sampler
            if context.processes.size == 1
            else DataParallelGenerator(sampler, context.processes, within)
        )

    def _served(
        self, serving: Serving, model: Policy | ReferencePolicy, sampling: SamplingConfig
    ) -> HttpGenerator:
        policy = self.context.policy
        # Without a reward token and before training, the policy equals the original model.
        is_policy = isinstance(model, Policy)
        return HttpGenerator(
            model.causal,
            policy.tokenizer,
            policy.reward_tokens,
            sampling,
            self.context.device,
            server=serving.server,
            publish=serving.weights.newest if is_policy else serving.weights.initial,
            num_columns=policy.model.get_output_embeddings().weight.shape[0],
        )

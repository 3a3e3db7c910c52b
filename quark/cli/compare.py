"""``quark compare``: any number of runs, checkpoints and plain models on the same prompts, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.trust import AllowOption

if TYPE_CHECKING:
    from quark.api.trained_model import TrainedModel
    from quark.config.schema import RunConfig
    from quark.evaluation.evaluator import Evaluation, Evaluator
    from quark.evaluation.figures import Figure
    from quark.models.policy import Policy
    from quark.reference.base import ReferencePolicy
    from quark.training.factories import Rewards
    from quark.types import Prompt


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL[@QUANTILE]...",
            help="Runs, checkpoint folders, model folders or models' names.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(help="File with prompts. Default: those that the first run held out."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Reward to measure; repeat it to add judges. Default: the first run's."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Model for KL and perplexity. Default: the first run's original, else the first model.",
            show_default=False,
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num", "-n", min=1, help="Completions per prompt. Default: the first run's."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion. Default: the first run's.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Softmax temperature, 0 is greedy. Default: the first run's."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Nucleus mass. Default: the first run's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the samples. Default: the first run's.")
    ] = None,
    allow: AllowOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print every figure as Markdown tables.")
    ] = False,
) -> None:
    """Measure several models on the same prompts and show paired differences from the first.

    A run answers from its best quantile, or from @QUANTILE (best, none or a number).
    All models are sampled with the same settings and random numbers. Intervals are 95 % bootstraps over
    prompts; differences resample the same prompts for both models.

    **Examples**

    * `quark compare runs/a runs/b embedded:reviews`

    * `quark compare runs/a@best runs/a@0 runs/a/checkpoints/step-00000024 --num 25 --top-p 0.9 --markdown`
    """
    from quark.cli.console import make_console, print_json, prints_to_stderr, prose
    from quark.cli.figure_tables import (
        Measured,
        difference_table,
        differences_to_json,
        markdown,
        scorers_to_json,
        table,
        to_json,
    )

    wishes: dict[str, dict[str, object]] = {
        "sampling": {"max_new_tokens": max_new_tokens},
        "evaluation": {
            "completions_per_prompt": num,
            "temperature": temperature,
            "top_p": top_p,
            "judges": tuple(reward[1:]) if reward else None,
        },
        "reward": {"name": reward[0] if reward else None},
        "run": {"seed": seed},
    }
    with prints_to_stderr():
        sources = [_Contestant.of(name, allow) for name in _distinct(models)]
        bench = _Bench.of(sources, wishes, reference, prompts, named=reward or (), allow=allow)
        measured = [Measured(source.name, bench.figures(source)) for source in sources]
    first, *others = measured
    judges = bench.config.evaluation.judges
    if as_json:
        print_json(
            {
                "reference": bench.reference_name,
                "reward": bench.config.reward.name,
                "scorers": scorers_to_json(bench.rewards),
                "prompts": len(bench.prompts),
                "completions_per_prompt": bench.config.evaluation.completions_per_prompt,
                "models": [{"model": m.name, "figures": to_json(m)} for m in measured],
                "differences": [
                    {
                        "model": m.name,
                        "minus": first.name,
                        "figures": differences_to_json(m, first),
                    }
                    for m in others
                ],
            }
        )
        return
    console = make_console()
    if as_markdown:
        console.print(prose(markdown(measured)), soft_wrap=True)
        return
    console.print(table(measured, judges))
    if others:
        console.print()
        console.print(difference_table(measured, judges))
    note = (
        f"{len(bench.prompts)} prompts, KL and perplexity under {bench.reference_name}; ±: 95 % over prompts, bold "
        "where 0 is outside"
    )
    console.print(prose(note, "dim"), soft_wrap=True)


def _distinct(names: Sequence[str]) -> list[str]:
    from quark.errors import ConfigError

    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given twice: name each model once")
    return list(names)


@dataclass(frozen=True, slots=True)
class _Contestant:
    """A model of the command line."""

    name: str
    """As the user wrote it."""
    source: TrainedModel
    quantile: int | None

    @classmethod
    def of(cls, name: str, allow: Sequence[str] | None) -> _Contestant:
        from quark.api.trained_model import open_model
        from quark.errors import ConfigError

        model, at, quantile = name.rpartition("@")
        if not at or Path(name).exists():
            model, quantile = name, ""
        folder, checkpoint = Path(model), None
        if folder.parent.name == "checkpoints" and folder.is_dir():
            model = str(folder.parent.parent)
            checkpoint = folder.name.removeprefix("step-").lstrip("0") or "0"
        source = open_model(model, exactly=True, checkpoint=checkpoint, allow=allow or ())
        chosen = source.quantile(quantile or None)
        if chosen is None and source.policy is not None:
            raise ConfigError(f"{name}: to compare with the original model, name that model")
        return cls(name, source, chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """What all models share: prompts, scorers, sampling settings and the reference."""

    config: RunConfig
    prompts: Sequence[Prompt]
    """In the tokens of ``home``."""
    home: TrainedModel
    """The first run, or else the first model."""
    rewards: Rewards
    reference: ReferencePolicy
    reference_name: str
    yardstick: Policy
    """The reference with reward tokens that nothing is conditioned on: says how its batches are made."""

    @classmethod
    def of(
        cls,
        contestants: Sequence[_Contestant],
        wishes: dict[str, dict[str, object]],
        reference: str | None,
        file: Path | None,
        *,
        named: Sequence[str],
        allow: Sequence[str] | None,
    ) -> _Bench:
        from quark.api.measurement import held_out_prompts, prompt_sections
        from quark.api.trained_model import overridden
        from quark.api.trust import check_reach
        from quark.cli.console import tell
        from quark.training.factories import (
            frozen_reference,
            make_rewards,
            untrained_policy,
            use_threads,
        )

        runs = [c.source for c in contestants if c.source.is_run]
        source = runs[0] if runs else contestants[0].source
        given = {
            section: {key: value for key, value in values.items() if value is not None}
            for section, values in wishes.items()
        }
        config = overridden(source.config, given)
        if reference is not None or not runs:
            name = reference or contestants[0].source.name
            config = overridden(config, {"model": {"name": name}})
        for run in runs:
            sections = ["model"]
            if run is source:
                sections += ["reward", "evaluation", *prompt_sections(source, file)]
            keys = [("reward.name", n) for n in named[:1]]
            keys += [("evaluation.judges", n) for n in named[1:]]
            keys += [] if reference is None else [("model.name", reference)]
            check_reach(
                config if run is source else run.config,
                Path(run.name),
                sections=sections,
                named=keys,
                allow=allow,
            )
        use_threads(config)
        prompts = source.prompts_of(file) if file else held_out_prompts(source, config, tell)
        yardstick = untrained_policy(config, source.device)
        return cls(
            config=config,
            prompts=prompts,
            home=source,
            rewards=make_rewards(config, explores=False),
            reference=frozen_reference(config, yardstick, source.device),
            reference_name=config.model.name,
            yardstick=yardstick,
        )

    def figures(self, contestant: _Contestant) -> dict[str, Figure]:
        """The figures of one model, with NaN for KL and perplexity if it has another vocabulary than the reference."""
        from quark.api.measurement import require_scores
        from quark.cli.console import tell
        from quark.evaluation.figures import figures_of
        from quark.training.processes.devices import make_autocast

        tell(f"evaluating {contestant.name}")
        source = contestant.source
        is_comparable = self._has_our_vocabulary(source)
        if not is_comparable:
            tell(
                f"{contestant.name} has another vocabulary than {self.reference_name}: no KL and perplexity",
                level="warning",
            )
        with make_autocast(source.config.run.precision, source.device)():
            evaluation = self._evaluation(contestant, is_comparable=is_comparable)
        for failure in evaluation.failures:
            tell(failure, level="warning")
        require_scores([evaluation], self.config.reward.name)
        return figures_of(
            evaluation,
            per_prompt=self.config.evaluation.completions_per_prompt,
            reward=self.config.reward.name,
        )

    def _evaluation(self, contestant: _Contestant, *, is_comparable: bool) -> Evaluation:
        from quark.evaluation.evaluator import Likelihoods
        from quark.training.factories import held_out_sampling

        source, quantile = contestant.source, contestant.quantile
        evaluator = self._evaluator(source)
        completions = evaluator.sample(
            source.generator(held_out_sampling(self.config)), quantile=quantile
        )
        if is_comparable:
            likelihoods = evaluator.likelihoods(
                completions,
                source.policy or self.yardstick,
                quantile=quantile,
                plain=None if source.policy is not None else self._plain(source),
            )
        else:
            likelihoods = Likelihoods.unknown(len(completions))
        return evaluator.measure(completions, likelihoods, quantile=quantile)

    def _plain(self, source: TrainedModel) -> ReferencePolicy:
        """A model without reward tokens, run at the same positions as the reference."""
        from quark.models.positions import original_leading_positions
        from quark.reference.base import FrozenReference

        has_leading = self.yardstick.num_leading_positions > 0
        leading = original_leading_positions(source.model) if has_leading else 0
        return FrozenReference(source.model, num_leading_positions=leading)

    def _evaluator(self, source: TrainedModel) -> Evaluator:
        from quark.training.factories import make_evaluator

        return make_evaluator(
            self.config,
            self.prompts
            if _vocabulary(source) == _vocabulary(self.home)
            else source.in_its_tokens(self.prompts),
            self.reference,
            self.rewards.reward,
            self.rewards.judges,
        )

    def _has_our_vocabulary(self, source: TrainedModel) -> bool:
        own = {t: i for t, i in self.yardstick.tokenizer.get_vocab().items() if i < self._width}
        return _vocabulary(source) == own

    @property
    def _width(self) -> int:
        return self.yardstick.reward_tokens.base_vocab_size


def _vocabulary(source: TrainedModel) -> dict[str, int]:
    """The ids of a model's tokens, without reward tokens."""
    vocabulary: dict[str, int] = source.tokenizer.get_vocab()
    if source.policy is None:
        return vocabulary
    width = source.policy.reward_tokens.base_vocab_size
    return {token: i for token, i in vocabulary.items() if i < width}

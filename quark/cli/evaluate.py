"""``quark evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.trust import AllowOption, check_reach, may_read_prompts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quark.cli.trained_model import TrainedModel
    from quark.config.schema import RunConfig
    from quark.evaluation.evaluator import Evaluation
    from quark.types import Prompt

_COLUMNS = (
    ("reward", "reward_mean", 3),
    ("KL", "kl_policy_to_reference", 3),
    ("perplexity", "perplexity_reference", 1),
    ("distinct-2", "distinct_2", 2),
    ("length", "completion_length_mean", 1),
)
"""What people see; ``--json`` has every figure."""


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A run directory, a model folder or a model's name.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="File with prompts. Default: the run's held-out ones.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Reward to measure; further ones are judges. Default: the run's."),
    ] = None,
    quantile: Annotated[
        list[str] | None,
        typer.Option(
            "--quantile",
            "-q",
            metavar="best|none|0..K-1",
            help="Only these. Default: all and none.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Original model for KL and perplexity. Default: the run's.", show_default=False
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option("--num", "-n", min=1, help="Completions per prompt. Default: the run's."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Away from the worst token this strongly. Default: the run's."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Draws other completions of the same prompts. Default: the run's."
        ),
    ] = None,
    allow: AllowOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Measure a model on held-out prompts: reward, KL, perplexity, diversity, control curve.

    The first row is the original model without a token; the others are the trained model under each
    reward token.

    **Examples**

    * `quark evaluate runs/demo`

    * `quark evaluate runs/demo --reward sentiment --reward toxicity --prompts mine.jsonl`

    * `quark evaluate path/to/model --reference embedded:reviews`
    """
    from quark.cli.console import make_console, print_json, prints_to_stderr
    from quark.cli.trained_model import NONE, open_model, overridden

    source = open_model(model, exactly=True)
    config = _configured(source, rewards=reward or (), reference=reference, num=num, seed=seed)
    if guidance is not None:
        config = overridden(config, {"sampling": {"guidance": guidance}})
    if source.is_run:
        check_reach(
            config,
            Path(model),
            sections=("model", "reward", "evaluation", *_prompt_sections(source, prompts)),
            named=[
                *(("reward.name", name) for name in (reward or ())[:1]),
                *(("evaluation.judges", name) for name in (reward or ())[1:]),
                *(() if reference is None else [("model.name", reference)]),
            ],
            allow=allow,
        )
    wanted = quantile or [NONE, *map(str, range(source.num_quantiles))]
    quantiles = list(dict.fromkeys(source.quantile(text) for text in wanted))
    with prints_to_stderr():
        evaluations = _evaluate(source, config, quantiles, prompts)
    by_quantile = {evaluation.quantile: evaluation for evaluation in evaluations}
    curve = [
        by_quantile[k].metrics["reward_mean"]
        for k in range(source.num_quantiles)
        if k in by_quantile
    ]
    is_whole_curve = source.num_quantiles > 0 and len(curve) == source.num_quantiles
    if as_json:
        print_json(
            {
                "model": model,
                "reference": config.model.name,
                "reward": config.reward.name,
                "evaluations": [
                    {"quantile": e.quantile, **e.metrics, "judges": e.judges} for e in evaluations
                ],
                "control_curve": curve if is_whole_curve else None,
            }
        )
        return
    console = make_console()
    console.print(_table(evaluations, source.num_quantiles, config.evaluation.judges))
    if is_whole_curve:
        from quark.cli.console import heading
        from quark.cli.run_display import control_curve_chart

        console.print()
        console.print(heading("Reward when asked for each quantile"))
        console.print(control_curve_chart(curve, width=console.width // 3))


def _prompt_sections(source: TrainedModel, prompts: Path | None) -> list[str]:
    """What of the configuration says where prompts are, if that is needed: a run has a record of its own."""
    from quark.run_directory import RunDirectory

    is_needed = prompts is None and not RunDirectory(Path(source.name)).held_out.exists()
    return ["prompts"] if is_needed else []


def _configured(
    source: TrainedModel,
    *,
    rewards: tuple[str, ...] | list[str],
    reference: str | None,
    num: int | None,
    seed: int | None,
) -> RunConfig:
    """The source's configuration with the command line's wishes."""
    from quark.cli.trained_model import overridden
    from quark.errors import ConfigError

    config = source.config
    if source.policy is not None and not source.is_run and reference is None:
        raise ConfigError(
            f"{source.name} does not say which model it was trained from: give --reference"
        )
    if source.policy is None:
        reference = source.name
    values: dict[str, dict[str, object]] = {"evaluation": {}, "reward": {}, "model": {}, "run": {}}
    if rewards:
        values["reward"]["name"] = rewards[0]
        values["evaluation"]["judges"] = tuple(rewards[1:])
    if num is not None:
        values["evaluation"]["completions_per_prompt"] = num
    if reference is not None:
        values["model"]["name"] = reference
    if seed is not None:
        values["run"]["seed"] = seed
    return overridden(config, values)


def _evaluate(
    source: TrainedModel, config: RunConfig, quantiles: list[int | None], prompts: Path | None
) -> list[Evaluation]:
    import sys

    from quark.cli.console import foreign, make_console, prose
    from quark.generation.transformers_generator import TransformersGenerator
    from quark.training.devices import make_autocast
    from quark.training.parts import (
        frozen_reference,
        held_out_sampling,
        make_evaluator,
        make_reference,
        make_rewards,
        untrained_policy,
        use_threads,
    )

    use_threads(config)
    device = source.device
    policy = source.policy or untrained_policy(config, device)
    is_own = config.model == source.config.model
    reference = (make_reference if is_own else frozen_reference)(config, policy, device)
    progress = make_console(sys.stderr)
    if prompts is not None:
        chosen = tuple(source.prompts_of(prompts))
    else:
        chosen = _held_out(source, config, progress)
    rewards = make_rewards(config)
    evaluator = make_evaluator(config, chosen, reference, rewards.reward, rewards.judges)
    autocast = make_autocast(config.run.precision, device)
    if source.is_run and is_own and config.model.lora.rank and policy.adapter is None:
        progress.print(
            prose(
                "  no checkpoint has this model's adapters: measuring it with them merged, which rounds",
                "dim",
            )
        )
    evaluations = []
    for quantile in quantiles:
        name = "the original model" if quantile is None else f"quantile {quantile}"
        progress.print(prose(f"  evaluating {name} on {len(chosen)} prompts", "dim"))
        generator = TransformersGenerator(
            reference.causal if quantile is None else policy,
            policy.tokenizer,
            policy.reward_tokens,
            held_out_sampling(config),
            device,
        )
        with autocast():
            evaluation = evaluator.evaluate(generator, policy, quantile=quantile)
        for failure in evaluation.failures:
            progress.print(foreign(f"warning: {failure}", style="yellow"), soft_wrap=True)
        evaluations.append(evaluation)
    _require_scores(evaluations, config.reward.name)
    return evaluations


def _held_out(source: TrainedModel, config: RunConfig, progress: Console) -> tuple[Prompt, ...]:
    """The prompts that a run held out, whatever became of its prompt file; those of the default file for a model."""
    from quark.cli.console import foreign
    from quark.run_directory import RunDirectory
    from quark.training.held_out import are_those_of, read_held_out
    from quark.training.parts import prompts_of

    def warn(text: str) -> None:
        progress.print(foreign(f"warning: {text}", style="yellow"), soft_wrap=True)

    if not source.is_run:
        # The run's seed splits, and --seed only samples.
        return prompts_of(source.config.model_copy(update={"model": config.model})).evaluation
    run = RunDirectory(Path(source.name))
    recorded = read_held_out(run)
    if recorded is not None:
        # A file that the user has not allowed is not looked at: the record may be a stranger's.
        if may_read_prompts(config, run.path, recorded.source) and recorded.source_has_changed():
            warn(
                f"{recorded.source} has changed since the run began: measuring on the prompts that the run held out"
            )
        return recorded.prompts
    found = prompts_of(source.config).evaluation
    warn("the run does not record its held-out prompts: its prompt file is split again by its seed")
    if not are_those_of(run, found):
        warn(
            "these are other prompts than it held out, so some may have been trained on: see --prompts"
        )
    return found


def _require_scores(evaluations: list[Evaluation], reward: str) -> None:
    """Raise RewardError where no completion at all got a score."""
    import numpy as np

    from quark.errors import RewardError

    if all(np.isnan(evaluation.rewards).all() for evaluation in evaluations):
        num_completions = sum(len(evaluation.completions) for evaluation in evaluations)
        reasons = next((e.failures[0] for e in evaluations if e.failures), "every score is NaN")
        raise RewardError(
            f"the reward {reward} scored none of {num_completions} completions: {reasons}. "
            f"`quark reward check {reward}` tries it alone"
        )


def _table(evaluations: list[Evaluation], num_quantiles: int, judges: tuple[str, ...]) -> Table:
    from quark.cli.console import foreign, grid, number, prose

    titles = [title for title, _, _ in _COLUMNS]
    table = grid("token", *titles, *judges, right=range(1, 1 + len(titles) + len(judges)))
    for evaluation in evaluations:
        quantile = evaluation.quantile
        if quantile is None:
            name, style = "none (original)", "dim"
        else:
            is_best = quantile == num_quantiles - 1
            name = (
                f"{quantile} (best)"
                if is_best
                else f"{quantile} (worst)"
                if not quantile
                else str(quantile)
            )
            style = "green" if is_best else "red" if not quantile else ""
        table.add_row(
            prose(name, style),
            *(prose(number(evaluation.metrics.get(key), digits)) for _, key, digits in _COLUMNS),
            *(foreign(number(evaluation.judges.get(judge))) for judge in judges),
        )
    return table

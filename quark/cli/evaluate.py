"""``quark evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.trust import AllowOption, check_reach

if TYPE_CHECKING:
    from rich.table import Table

    from quark.cli.trained_model import TrainedModel
    from quark.config.schema import RunConfig
    from quark.evaluation.evaluator import Evaluation

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
        int | None, typer.Option(min=0, help="Of the sampling. Default: the run's.")
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

    source = open_model(model)
    config = _configured(source, rewards=reward or (), reference=reference, num=num, seed=seed)
    if guidance is not None:
        config = overridden(config, {"sampling": {"guidance": guidance}})
    if source.is_run:
        check_reach(
            config,
            Path(model),
            sections=("model", "reward", "evaluation", *(["prompts"] if prompts is None else [])),
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
    from quark.data.prompts import load_prompts
    from quark.evaluation.evaluator import Evaluator
    from quark.generation.transformers_generator import TransformersGenerator
    from quark.models.loading import load_base_model, load_policy, load_tokenizer
    from quark.reference.base import FrozenReference
    from quark.rewards.build import build_judges, build_reward
    from quark.training.seeds import derive_seed

    policy = source.policy or load_policy(
        config.model, num_quantiles=config.pool.num_quantiles, seed=0, device=source.device
    )
    reference = FrozenReference(load_base_model(config.model, device=source.device))
    seed = config.run.seed
    if prompts is None:
        chosen = load_prompts(
            config.prompts, load_tokenizer(config.model), seed=derive_seed(seed, "split")
        ).evaluation
    else:
        chosen = tuple(source.prompts_of(prompts))
    sampling = config.sampling
    if config.evaluation.top_p is not None:
        sampling = sampling.model_copy(update={"top_p": config.evaluation.top_p})
    evaluator = Evaluator(
        prompts=chosen,
        reference=reference,
        reward=build_reward(config.reward),
        judges=build_judges(config.evaluation.judges, config.reward),
        completions_per_prompt=config.evaluation.completions_per_prompt,
        batch_size=sampling.batch_size,
        seed=derive_seed(seed, "evaluate"),
    )
    progress = make_console(sys.stderr)
    evaluations = []
    for quantile in quantiles:
        name = "the original model" if quantile is None else f"quantile {quantile}"
        progress.print(prose(f"  evaluating {name} on {len(chosen)} prompts", "dim"))
        generator = TransformersGenerator(
            reference.model if quantile is None else policy,
            policy.tokenizer,
            policy.reward_tokens,
            sampling,
            source.device,
        )
        evaluation = evaluator.evaluate(generator, policy, quantile=quantile)
        for failure in evaluation.failures:
            progress.print(foreign(f"warning: {failure}", style="yellow"), soft_wrap=True)
        evaluations.append(evaluation)
    return evaluations


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

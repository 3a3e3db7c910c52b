"""``quark evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.checkpoint_option import CheckpointOption
from quark.cli.trust import AllowOption

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from quark.cli.figure_tables import Measured
    from quark.config.schema import RunConfig
    from quark.evaluation.conditioning import Conditioning
    from quark.evaluation.evaluator import Evaluation

_COLUMNS = (
    ("reward", "reward_mean", 3),
    ("KL", "kl_sampled_to_reference", 3),
    ("per text", "kl_sampled_per_completion", 1),
    ("perplexity", "perplexity_reference", 1),
    ("distinct-2", "distinct_2", 2),
    ("length", "completion_length_mean", 1),
)
"""Columns of the table; ``--json`` has every figure. KL is that of the sampled distribution, per
token and per completion."""


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
        typer.Option(help="Reward to measure; repeat it to add judges. Default: the run's."),
    ] = None,
    quantile: Annotated[
        list[str] | None,
        typer.Option(
            "--quantile",
            "-q",
            metavar="best|none|0..K-1",
            help="Quantiles to evaluate. Default: all, and none.",
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
        typer.Option(
            min=0.0, help="Strength of guidance away from the worst quantile. Default: the run's."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Draws other completions of the same prompts. Default: the run's."
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    allow: AllowOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print every figure as Markdown tables.")
    ] = False,
) -> None:
    """Measure a model on held-out prompts: reward, KL, perplexity, diversity, control curve.

    The first row is the original model without a token; each of the others is the trained model
    asked for one quantile. A model without a run is measured on the embedded prompts, or on --prompts.
    --json and --markdown have every figure with its 95 % interval over prompts.

    **Examples**

    * `quark evaluate runs/demo`

    * `quark evaluate runs/demo --reward sentiment --reward toxicity --prompts mine.jsonl`

    * `quark evaluate path/to/model --reference embedded:reviews`
    """
    from dataclasses import asdict

    from quark.api.measurement import Measurement, check_run, configured, require_scores
    from quark.api.trained_model import NONE, open_model, overridden, say_checkpoint
    from quark.cli.console import make_console, print_json, prints_to_stderr, prose, tell
    from quark.cli.figure_tables import markdown, scorers_to_json, to_json

    source = open_model(model, exactly=True, checkpoint=checkpoint, allow=allow or ())
    say_checkpoint(source, tell)
    config = configured(source, rewards=reward or (), reference=reference, num=num, seed=seed)
    if guidance is not None:
        config = overridden(config, {"sampling": {"guidance": guidance}})
    check_run(source, config, prompts=prompts, rewards=reward, reference=reference, allow=allow)
    wanted = quantile or [NONE, *map(str, range(source.num_quantiles))]
    quantiles = list(dict.fromkeys(source.quantile(text) for text in wanted))
    with prints_to_stderr():
        measurement = Measurement.of(source, config, prompts, tell=tell)
        evaluations = [measurement.evaluate(config.sampling.guidance, k) for k in quantiles]
        require_scores(evaluations, config.reward.name)
        conditioning = measurement.conditioning(evaluations)
    measured = [_measured(e, config, source.num_quantiles) for e in evaluations]
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
                "figures": [
                    {"quantile": e.quantile, "figures": to_json(m)}
                    for e, m in zip(evaluations, measured, strict=True)
                ],
                "conditioning": None if conditioning is None else asdict(conditioning),
                "scorers": scorers_to_json(measurement.rewards),
            }
        )
        return
    console = make_console()
    if as_markdown:
        console.print(prose(markdown(measured)), soft_wrap=True)
        return
    console.print(_table(evaluations, source.num_quantiles, config.evaluation.judges))
    if is_whole_curve:
        from quark.cli.console import heading
        from quark.cli.run_display import control_curve_chart

        console.print()
        console.print(heading("Reward when asked for each quantile"))
        console.print(control_curve_chart(curve, width=console.width // 3))
    if conditioning is not None:
        console.print()
        console.print(_information(conditioning), soft_wrap=True)


def _measured(evaluation: Evaluation, config: RunConfig, num_quantiles: int) -> Measured:
    from quark.cli.figure_tables import Measured
    from quark.evaluation.figures import figures_of

    per_prompt = config.evaluation.completions_per_prompt
    figures = figures_of(evaluation, per_prompt=per_prompt, reward=config.reward.name)
    return Measured(_name(evaluation.quantile, num_quantiles), figures)


def _information(conditioning: Conditioning) -> Text:
    """The mutual information between token and text, as a warning where the tokens are ignored."""
    from quark.cli.console import number, prose

    found, most = conditioning.information, math.log(conditioning.num_quantiles)
    text = (
        f"The tokens tell {number(found.mean)} of {number(most, 2)} nats about the text "
        f"({number(found.low)} to {number(found.high)})"
    )
    if conditioning.has_collapsed:
        return prose(f"warning: {text}: the model ignores its reward tokens", "yellow")
    return prose(text, "dim")


def _name(quantile: int | None, num_quantiles: int) -> str:
    if quantile is None:
        return "none (original)"
    is_best = quantile == num_quantiles - 1
    return f"{quantile} (best)" if is_best else str(quantile) if quantile else "0 (worst)"


def _table(evaluations: list[Evaluation], num_quantiles: int, judges: tuple[str, ...]) -> Table:
    from quark.cli.console import foreign, grid, number, prose

    titles = [title for title, _, _ in _COLUMNS]
    table = grid("quantile", *titles, *judges, right=range(1, 1 + len(titles) + len(judges)))
    for evaluation in evaluations:
        quantile = evaluation.quantile
        if quantile is None:
            style = "dim"
        else:
            style = "green" if quantile == num_quantiles - 1 else "red" if not quantile else ""
        table.add_row(
            prose(_name(quantile, num_quantiles), style),
            *(prose(number(evaluation.metrics.get(key), digits)) for _, key, digits in _COLUMNS),
            *(foreign(number(evaluation.judges.get(judge))) for judge in judges),
        )
    return table

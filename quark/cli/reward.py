"""``quark reward``: train your own scorer, or test any reward before a run depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from quark.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from quark.rewards.classifier_training import ClassifierReport
    from quark.rewards.config import RewardConfig
    from quark.rewards.held_out_report import HeldOutReport
    from quark.rewards.linear_training import TrainReport
    from quark.types import Json

app = typer.Typer(help="Train your own scorer; check any reward.", no_args_is_help=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

_CAREFUL_RATE = 2e-5
"""Learning rate of a pre-trained encoder: the embedded model of a million parameters takes larger steps."""


class Kind(StrEnum):
    """The scorers that can be trained."""

    LINEAR = "linear"
    CLASSIFIER = "classifier"


class SharedOptions(NamedTuple):
    """Options of both kinds."""

    name: str | None
    text_field: str
    target_field: str | None
    is_penalty: bool
    held_out_fraction: float
    on_progress: Callable[[str], None]


@app.command("train")
def train_scorer(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.jsonl", help="File with one JSON object per line.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the reward. Default: the folder's name.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text.")] = "text",
    target_field: Annotated[
        str | None,
        typer.Option(help="Field of the target in [0, 1]. Default: label, else score."),
    ] = None,
    penalty: Annotated[
        bool, typer.Option("--penalty", help="The target is unwanted: reward = 1 - score.")
    ] = False,
    held_out_fraction: Annotated[
        float,
        typer.Option(min=0.0, max=0.9, help="Share of the texts held out to measure the scorer."),
    ] = 0.1,
    kind: Annotated[
        Kind,
        typer.Option(
            help="linear: hashed n-grams, seconds to train. classifier: a fine-tuned neural network."
        ),
    ] = Kind.LINEAR,
    l2: Annotated[
        float | None,
        typer.Option(min=0.0, help="linear: strength of the penalty on the weights. Default: 1."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="classifier: model that gets the new head, as in model.name. Default: embedded:reviews."
        ),
    ] = None,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="classifier: train the head alone.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="classifier: passes over the data. Default: 3.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="classifier: the highest. Default: 5e-4, or 2e-5 for another encoder."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="classifier: longer texts are cut, in tokens. Default: 128."),
    ] = None,
    ensemble: Annotated[
        int | None,
        typer.Option(min=1, help="Number of scorers to train, each on its own bootstrap sample."),
    ] = None,
    label_noise: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="With --ensemble: share of the training labels that are flipped."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="With --ensemble: seed of both.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing scorer in the folder.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a scorer on labeled texts, for use as a reward: a small linear one, or a neural classifier.

    **Examples**

    * `quark reward train reviews.jsonl --output scorers/reviews`  with lines such as
    `{"text": "easy to use", "label": 1}`

    * `quark reward train reviews.jsonl --output scorers/neural --kind classifier`
    """
    import dataclasses
    import sys

    from quark.cli.console import figures, make_console, print_json, prose
    from quark.cli.scorer_folder import check_output
    from quark.errors import ConfigError
    from quark.rewards.linear import SETTINGS_FILE

    if ensemble is not None:
        from quark.cli.reward_ensemble import train_ensemble

        if kind is Kind.CLASSIFIER:
            raise ConfigError("--ensemble trains linear scorers: leave out --kind classifier")
        _refuse(kind, encoder=encoder, frozen=frozen or None, epochs=epochs, max_length=max_length)
        _refuse(kind, learning_rate=learning_rate)
        train_ensemble(
            data,
            output,
            number=ensemble,
            label_noise=label_noise,
            seed=seed,
            name=name,
            text_field=text_field,
            target_field=target_field,
            is_penalty=penalty,
            held_out_fraction=held_out_fraction,
            l2=1.0 if l2 is None else l2,
            force=force,
            as_json=as_json,
        )
        return
    if label_noise:
        raise ConfigError("--label-noise needs --ensemble; one scorer is --ensemble 1")
    check_output(output, SETTINGS_FILE, "a scorer", force=force)
    progress = make_console(sys.stderr)
    shared = SharedOptions(
        name=name,
        text_field=text_field,
        target_field=target_field,
        is_penalty=penalty,
        held_out_fraction=held_out_fraction,
        on_progress=lambda text: progress.print(prose(text, "dim")),
    )
    report: HeldOutReport
    if kind is Kind.LINEAR:
        _refuse(kind, encoder=encoder, frozen=frozen or None, epochs=epochs, max_length=max_length)
        _refuse(kind, learning_rate=learning_rate)
        report, lines = _train_linear(data, output, shared, l2=1.0 if l2 is None else l2)
    else:
        _refuse(kind, l2=l2)
        given: dict[str, object] = {
            "encoder": encoder,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "max_length": max_length,
        }
        settings = {key: value for key, value in given.items() if value is not None}
        report, lines = _train_classifier(data, output, shared, settings, is_frozen=frozen)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    make_console().print(figures([*lines, ("written to", str(output))]))


def _refuse(kind: Kind, **options: object) -> None:
    """Raise ConfigError for an option that the kind of scorer does not have."""
    from quark.errors import ConfigError

    for option, value in options.items():
        if value is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} does not apply to --kind {kind.value}: leave it out"
            )


def _train_linear(
    data: Path, output: Path, shared: SharedOptions, *, l2: float
) -> tuple[TrainReport, list[tuple[str, str]]]:
    from quark.cli.console import count, size
    from quark.rewards.linear_training import train_linear_scorer

    report = train_linear_scorer(data, output, l2=l2, **shared._asdict())
    weights = ("weights", f"{count(report.num_weights)}, {size(report.num_bytes)}")
    return report, [*_agreement(report), weights]


def _train_classifier(
    data: Path,
    output: Path,
    shared: SharedOptions,
    settings: dict[str, object],
    *,
    is_frozen: bool,
) -> tuple[ClassifierReport, list[tuple[str, str]]]:
    from quark.cli.console import count, number
    from quark.rewards.classifier_training import ClassifierTraining, train_classifier

    if "encoder" in settings and "learning_rate" not in settings and not is_frozen:
        settings["learning_rate"] = _CAREFUL_RATE
    training = ClassifierTraining(is_frozen=is_frozen, **settings)  # type: ignore[arg-type]  # checked by Typer
    report = train_classifier(data, output, training, **shared._asdict())
    calibration = report.calibration
    return report, [
        *_agreement(report),
        (
            "calibration",
            f"error {number(calibration.error)}, Brier score {number(calibration.brier)}",
        ),
        ("parameters", f"{count(report.num_parameters)}, {count(report.num_trained)} trained"),
    ]


def _agreement(report: HeldOutReport) -> list[tuple[str, str]]:
    """The lines on the held-out texts, for both kinds of report."""
    from quark.cli.console import count, number

    return [
        ("trained on", f"{count(report.num_train)} texts, {count(report.num_held_out)} held out"),
        ("AUC", number(report.auc)),
        ("accuracy", number(report.accuracy)),
        ("correlation", f"{number(report.pearson)} (rank: {number(report.spearman)})"),
    ]


@app.command()
def check(
    reward: Annotated[
        str,
        typer.Argument(
            metavar="NAME|MODULE:FUNCTION|FOLDER", help="The reward to test.", show_default=False
        ),
    ],
    samples: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with `prompt`, `completion` and the fields that the reward asks for. Default: a few built-in "
            "samples."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="A reward setting, e.g. reward.length.maximum=9.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Call a reward on a few samples and report whether a run can rely on it.

    Shows every score and looks for what makes training fail or stand still: errors, missing scores,
    one constant score, ties, slowness, answers that change from call to call. Exits with status 3
    if a run could not use it.

    **Examples**

    * `quark reward check sentiment`

    * `quark reward check ./my_rewards.py:politeness --samples some.jsonl`
    """
    import dataclasses
    import math

    from quark.cli.console import (
        completed,
        figures,
        foreign,
        grid,
        make_console,
        number,
        print_json,
        prints_to_stderr,
        prose,
    )
    from quark.errors import DataError
    from quark.rewards.build import build_reward
    from quark.rewards.checking import check_reward
    from quark.rewards.fields import fields_asked, require_fields

    config = reward_config(reward, set_ or ())
    with prints_to_stderr():
        function = build_reward(config)
        if samples is None:
            if required := fields_asked(function).required:
                raise DataError(
                    f"the reward {function.name} asks for {', '.join(sorted(required))}, which the built-in samples do "
                    "not have: give some that do, by --samples FILE.jsonl"
                )
            report = check_reward(function, batch_size=config.batch_size)
        else:
            read = _read_samples(samples)
            require_fields(function, [(sample.place, sample.fields) for sample in read])
            report = check_reward(
                function,
                [(sample.prompt, sample.completion) for sample in read],
                rows=[sample.fields for sample in read],
                batch_size=config.batch_size,
            )
    is_usable = not report.is_constant and report.num_failed < report.num_samples
    if as_json:
        fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
        fields["scores"] = [dataclasses.asdict(sample) for sample in report.scores]
        print_json({"reward": fields.pop("name"), "usable": is_usable, **fields})
    else:
        console = make_console()
        table = grid("score", "prompt", "completion", right=(0,), wide=(1, 2))
        table.columns[2].ratio = 3
        for sample in report.scores:
            table.add_row(
                prose(number(sample.score), "dim" if math.isnan(sample.score) else "bold"),
                foreign(sample.prompt, limit=200, style="dim"),
                completed(sample.completion, limit=400),
            )
        console.print(table)
        console.print()
        spread = f"{number(report.minimum)} .. {number(report.mean)} .. {number(report.maximum)}"
        console.print(
            figures(
                [
                    ("lowest, mean, highest", spread),
                    ("speed", f"{report.samples_per_s:,.0f} samples/s"),
                    ("ties", f"{report.repeated_share:.0%} of the scores"),
                    ("repeatable", "yes" if report.is_repeatable else "no"),
                ]
            )
        )
        for warning in report.warnings:
            console.print(prose("warning: " + warning, "yellow"), soft_wrap=True)
        verdict = "a run can use it" if is_usable else "a run could not learn from it"
        console.print(prose(verdict, "green" if is_usable else "bold red"))
    if not is_usable:
        raise typer.Exit(ExitCode.INPUT)


def reward_config(name: str, overrides: Sequence[str]) -> RewardConfig:
    """A reward by its name on the command line, with settings. Raises ConfigError."""
    from pydantic import ValidationError

    from quark.config.load import load_config
    from quark.errors import ConfigError
    from quark.settings import misfits

    settings = load_config(None, overrides).config.reward
    try:
        return type(settings).model_validate({**settings.model_dump(), "name": name})
    except ValidationError as err:
        raise ConfigError("\n".join(misfit.expected for misfit in misfits(err))) from err


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    place: str
    prompt: str
    completion: str
    fields: Mapping[str, Json]


def _read_samples(path: Path) -> list[_Sample]:
    from quark.bounded_files import parse_json
    from quark.data.prompt_rows import text_lines
    from quark.errors import DataError

    samples = []
    for number, line in text_lines(path):
        try:
            row = parse_json(line)
            fields = {key: row[key] for key in row.keys() - {"prompt", "completion"}}
            prompt, completion = row.get("prompt", ""), row["completion"]
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise DataError(
                f"{path}:{number}: a JSON object with `prompt` and `completion` is needed"
            ) from err
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise DataError(f"{path}:{number}: `prompt` and `completion` must be texts")
        samples.append(
            _Sample(place=f"{path}:{number}", prompt=prompt, completion=completion, fields=fields)
        )
    if not samples:
        raise DataError(f"{path} has no samples")
    return samples

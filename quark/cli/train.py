"""``quark train``."""

from __future__ import annotations

import dataclasses
import sys
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.completing import presets, setting_keys
from quark.cli.exit_codes import ExitCode
from quark.cli.trust import AllowOption

if TYPE_CHECKING:
    from quark.cli.run_display import RunDisplay
    from quark.config.load import LoadedConfig
    from quark.training.events import TrainingResult


def train(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET|CONFIG.toml|RUN_DIR",
            help="A preset's name (`quark config list`), a TOML file, or a run directory to resume. Default: demo.",
            show_default=False,
            autocompletion=presets,
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run directory. Default: runs/NAME OF THE SOURCE.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Override a key, e.g. objective.kl_coef=0.1.",
            autocompletion=setting_keys,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Score this many samples in total: chooses rounds, prompts and steps.",
            show_default=False,
        ),
    ] = None,
    from_pool: Annotated[
        Path | None,
        typer.Option(
            metavar="POOL",
            help="Begin with the samples of this pool, or of a run directory, in place of a first exploration.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Require an existing run to resume; fail without one.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; refuses an existing run without --force.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --fresh: delete the existing run.")
    ] = False,
    require_exact: Annotated[
        bool,
        typer.Option(
            "--require-exact",
            help="Refuse to resume if the run would not end with the bytes of an uninterrupted one.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Load everything, show the configuration and three scored prompts, and stop.",
        ),
    ] = False,
    allow: AllowOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show warnings only, no progress.")
    ] = False,
) -> None:
    """Train a model on a reward; an existing run directory is resumed.

    **Examples**

    * `quark train` – the embedded model and reward, offline, about a minute on a CPU

    * `quark train demo --set reward.name=length --run-dir runs/short`

    * `quark train my.toml --budget 1000` – stop after 1,000 scored samples

    * `quark train demo --from-pool runs/demo --run-dir runs/other` – begin with the samples of another run

    * `quark train runs/my` – resume a run with its own configuration

    * `quark train my.toml --dry-run` – check a configuration before a long run

    Ctrl-C (or SIGTERM) once finishes the step, writes a checkpoint and exits with status 75; the same
    command then resumes. A second Ctrl-C quits at once.

    Under `torchrun` or `accelerate launch` (`torchrun --nproc-per-node 8 -m quark train my.toml`) the
    processes sample and train together.
    """
    if resume and fresh:
        raise typer.BadParameter("--resume and --fresh exclude each other")
    if force and not fresh:
        raise typer.BadParameter("--force belongs to --fresh")
    for option, is_given in (("--budget", budget is not None), ("--dry-run", dry_run)):
        if from_pool is not None and is_given:
            raise typer.BadParameter(f"--from-pool and {option} exclude each other")
    from quark.cli.console import counted, make_console, prints_to_stderr, prose
    from quark.cli.run_display import RunDisplay
    from quark.cli.stopping import StopOnSignal
    from quark.training.processes.launch import rank_of_process

    is_main_process = rank_of_process() == 0
    progress = make_console(sys.stderr) if is_main_process else make_console(StringIO())
    with RunDisplay(progress, quiet=quiet) as display:
        # Before what takes seconds to import.
        display.on_message("loading torch and transformers")
        from quark.api.resuming import run_named, with_first_origins
        from quark.api.trust import check_source
        from quark.config.budget import load_within
        from quark.config.load import load_config

        resumed = run_named(source)
        if resumed is not None:
            source, run_dir = str(resumed.config), run_dir or resumed.path
        name, overrides = source if source is not None else "demo", set_ or ()
        if budget is None:
            loaded = load_config(name, overrides)
        else:
            loaded = load_within(name, overrides, budget=budget)
        check_source(loaded, source, allow)
        if resumed is not None:
            loaded = with_first_origins(loaded, resumed)
        if dry_run:
            if is_main_process:
                _dry_run(loaded, display, as_json=as_json)
            return
        directory = run_dir if run_dir is not None else Path("runs") / loaded.name
        if resume:
            _require_run(directory)
        config = loaded.config
        with (
            prints_to_stderr(),
            StopOnSignal(lambda text: display.on_message(text, level="warning")) as signals,
        ):
            from quark.api.training import run_training

            display.on_message(
                f"training {config.model.name} on {config.reward.name}, "
                f"{counted(config.run.num_rounds, 'round')} (0 to {config.run.num_rounds - 1}), in {directory}"
            )
            result = run_training(
                loaded,
                directory,
                listener=display,
                on_start=lambda trainer: signals.ask_through(trainer.request_stop),
                fresh=fresh,
                force=force,
                require_exact=require_exact,
                from_pool=from_pool,
            )
    if is_main_process:
        _print_result(result, as_json=as_json)
    if result.interrupted:
        progress.print(
            prose(f"interrupted; resume with: {_resume_command()}", "yellow"), soft_wrap=True
        )
        raise typer.Exit(ExitCode.INTERRUPTED)


def _require_run(run_dir: Path) -> None:
    from quark.errors import RunDirectoryError
    from quark.run_directory import RunDirectory

    if not RunDirectory(run_dir).is_run():
        raise RunDirectoryError(
            f"there is no run in {run_dir} to resume: leave out --resume to start one"
        )


def _dry_run(loaded: LoadedConfig, display: RunDisplay, *, as_json: bool) -> None:
    from quark.cli.config import values_table
    from quark.cli.console import (
        completed,
        count,
        figures,
        foreign,
        grid,
        heading,
        make_console,
        number,
        print_json,
        prints_to_stderr,
        prose,
    )
    from quark.training.dry_run import dry_run

    with prints_to_stderr():
        outcome = dry_run(loaded, listener=display)
    if as_json:
        fields = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
        fields["prompts"] = [dataclasses.asdict(prompt) for prompt in outcome.prompts]
        config = loaded.config.model_dump(mode="json")
        print_json({"config": config, "origins": dict(loaded.origins), **fields})
        return
    console = make_console()
    console.print(heading("Configuration"))
    console.print(values_table(loaded))
    console.print()
    console.print(heading("Loaded"))
    console.print(
        figures(
            [
                (
                    "model",
                    f"{loaded.config.model.name}, {count(outcome.num_parameters)} parameters",
                ),
                ("device", outcome.device),
                ("reward", loaded.config.reward.name),
                (
                    "prompts",
                    f"{count(outcome.num_train_prompts)} to train, "
                    f"{count(outcome.num_evaluation_prompts)} held out",
                ),
            ]
        )
    )
    for note in outcome.notes:
        console.print(prose("note: " + note, "yellow"), soft_wrap=True)
    console.print()
    console.print(heading("Three prompts as the policy sees them, answered by the original model"))
    table = grid("reward", "prompt", "completion", right=(0,), wide=(1, 2))
    for prompt in outcome.prompts:
        table.add_row(
            prose(number(prompt.reward), "bold"),
            foreign(prompt.text, limit=400),
            completed(prompt.completion, limit=400),
        )
    table.columns[1].no_wrap = table.columns[2].no_wrap = False
    console.print(table)
    console.print(prose("nothing was written", "dim"))


def _print_result(result: TrainingResult, *, as_json: bool) -> None:
    from quark.cli.console import make_console, print_json
    from quark.cli.run_display import print_next_steps, print_result

    if as_json:
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        fields["before_after"] = [dataclasses.asdict(pair) for pair in result.before_after]
        print_json(fields)
        return
    if not result.interrupted:
        console = make_console()
        print_result(console, result)
        print_next_steps(console, result)


def _resume_command() -> str:
    import shlex

    arguments = [text for text in sys.argv[1:] if text not in ("--fresh", "--force")]
    return shlex.join(["quark", *arguments])

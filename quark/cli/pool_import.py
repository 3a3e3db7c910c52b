"""``quark pool import``: appends the samples of files to a pool."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quark.cli.exit_codes import ExitCode
from quark.cli.pool_path import JsonFlag, PoolPath, pool_path

if TYPE_CHECKING:
    from rich.console import Console

    from quark.interchange.importing import FileImport
    from quark.interchange.layouts import Layout

_PROGRESS_S = 5.0
_NAMES_SHOWN = 30
_FORMATS = (
    *("auto", "quark", "trl", "verl", "prime-rl", "open-instruct", "lm-eval", "inspect"),
    *("jsonl", "csv", "parquet"),
)


def import_(
    path: PoolPath,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…",
            help="Files of `quark pool export` or another tool, or folders of such files.",
            show_default=False,
        ),
    ],
    format_: Annotated[
        str,
        typer.Option("--format", metavar="|".join(_FORMATS), help="Layout of the files."),
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="The model whose tokenizer encodes texts without token ids.",
            show_default=False,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORE",
            help="Score of the file to use as the column `reward`. Several scores are added.",
            show_default=False,
        ),
    ] = None,
    prompt_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="A column that belongs to the prompt. Other columns belong to the sample.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be imported, and write nothing.")
    ] = False,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**32 - 1,
            help="Vocabulary size of a new pool. A tokenizer or a Parquet export provides it.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Append the samples of files to a pool, or create a pool from them.

    Reads exports of quark, files of TRL, verl, prime-rl, open-instruct, lm-eval and Inspect, and any file with a prompt
    and a completion in each row. Rows that the pool already has are left alone, so an import can be repeated. Each row
    that cannot be imported is reported in one line, the others are imported, and the exit status is 3.

    **Examples**

    * `quark pool import copy samples.parquet`

    * `quark pool import mine grpo-output/completions --tokenizer Qwen/Qwen3-0.6B --dry-run`

    * `quark pool import mine ratings.csv --tokenizer gpt2 --reward stars`
    """
    from quark.interchange.layouts import Layout

    if format_ not in _FORMATS:
        raise typer.BadParameter(f"--format is one of {', '.join(_FORMATS)}, not {format_!r}")
    layout = None if format_ == "auto" else Layout(format_)
    if layout is None and tokenizer is None and not any(map(_is_foreign, files)):
        layout = Layout.QUARK
    if layout is Layout.QUARK:
        if dry_run or reward or prompt_column:
            raise typer.BadParameter(
                "--dry-run, --reward and --prompt-column are for the files of other tools"
            )
        _import_exports(pool_path(path), files, vocab_size, as_json=as_json)
        return
    if tokenizer is None:
        raise typer.BadParameter(
            "these are files of another tool: --tokenizer NAME_OR_FOLDER says for which model"
        )
    _import_foreign(
        pool_path(path),
        files,
        layout,
        tokenizer=tokenizer,
        rewards=reward or (),
        of_prompt=prompt_column or (),
        is_dry_run=dry_run,
        vocab_size=vocab_size,
        as_json=as_json,
    )


def _is_foreign(file: Path) -> bool:
    """Whether a file is recognized as one of another tool, or is a folder."""
    from quark.errors import ConfigError, DataError
    from quark.interchange.importing import layout_of
    from quark.interchange.layouts import Layout

    if file.is_dir():
        return True
    try:
        return layout_of(file) not in (None, Layout.QUARK)
    except (ConfigError, DataError, OSError):
        return False  # the import reports the reason


def _import_exports(
    pool: Path, files: list[Path], vocab_size: int | None, *, as_json: bool
) -> None:
    from quark.cli.console import count, make_console, print_json, prose
    from quark.pool.ingest import import_file

    results = [import_file(pool, file, vocab_size=vocab_size) for file in files]
    num_appended = sum(done.num_appended for done in results)
    num_known = sum(done.num_known for done in results)
    if as_json:
        print_json({"pool": pool, "appended": num_appended, "known": num_known})
    else:
        line = f"{pool}: {count(num_appended)} samples came, {count(num_known)} were there"
        make_console().print(prose(line, "green"), soft_wrap=True)


def _import_foreign(
    pool: Path,
    files: list[Path],
    layout: Layout | None,
    *,
    tokenizer: str,
    rewards: Sequence[str],
    of_prompt: Sequence[str],
    is_dry_run: bool,
    vocab_size: int | None,
    as_json: bool,
) -> None:
    from quark.cli.console import (
        count,
        foreign,
        make_console,
        print_json,
        prints_to_stderr,
        prose,
    )
    from quark.interchange.importing import Refusal, import_samples

    messages = make_console(sys.stderr)
    last_said = time.monotonic()

    num_refused = 0

    def on_refusal(refusal: Refusal) -> None:
        nonlocal num_refused
        num_refused += 1
        messages.print(foreign(f"not taken: {refusal}", style="yellow"), soft_wrap=True)

    def on_progress(file: Path, num_rows: int) -> None:
        nonlocal last_said
        if time.monotonic() - last_said > _PROGRESS_S:
            last_said = time.monotonic()
            messages.print(foreign(f"{file}: {count(num_rows)} rows", style="dim"), soft_wrap=True)

    with prints_to_stderr():
        from quark.models.config import ModelConfig
        from quark.models.loading import load_tokenizer, vocab_size_of

        loaded = load_tokenizer(ModelConfig(name=tokenizer))
        results = import_samples(
            pool,
            files,
            tokenizer=loaded,
            tokenizer_name=tokenizer,
            vocab_size=vocab_size or vocab_size_of(loaded),
            layout=layout,
            rewards=rewards,
            of_prompt=of_prompt,
            is_dry_run=is_dry_run,
            on_refusal=on_refusal,
            on_progress=on_progress,
        )
    if as_json:
        print_json(
            {
                "pool": pool,
                "appended": 0 if is_dry_run else sum(result.num_appended for result in results),
                "known": sum(result.num_known for result in results),
                "refused": num_refused,
                "files": [_fields(result, is_dry_run=is_dry_run) for result in results],
            }
        )
    else:
        console = make_console()
        for result in results:
            _print_file(console, result, is_dry_run=is_dry_run)
        came = sum(result.num_appended for result in results)
        there = count(sum(result.num_known for result in results))
        verb = "would come" if is_dry_run else "came"
        line = f"{pool}: {count(came)} samples {verb}, {there} were there"
        if num_refused:
            line += f", {count(num_refused)} rows or files were not taken"
        console.print(prose(line, "yellow" if num_refused else "green"), soft_wrap=True)
        if is_dry_run:
            console.print(prose("nothing was written", "dim"))
    if num_refused:
        raise typer.Exit(ExitCode.INPUT)


def _fields(result: FileImport, *, is_dry_run: bool) -> dict[str, Any]:
    return {
        "file": result.file,
        "format": str(result.layout),
        "would_append" if is_dry_run else "appended": result.num_appended,
        "known": result.num_known,
        "refused": result.num_refused,
        "recomputed_tokens": result.num_recomputed,
        "first_round": result.first_round,
        "last_round": result.last_round,
        "scores": result.scores,
        "prompt_metadata": sorted(result.prompt_metadata),
        "sample_metadata": sorted(result.sample_metadata),
    }


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    rest = len(names) - len(shown)
    return (", ".join(shown) or "nothing") + (f" and {rest:,} more" if rest else "")


def _print_file(console: Console, result: FileImport, *, is_dry_run: bool) -> None:
    from quark.cli.console import continued, count, figures, foreign

    console.print(foreign(str(result.file), style="bold"), soft_wrap=True)
    new = count(result.num_appended)
    rows: list[tuple[str, Any]] = [
        ("format", str(result.layout)),
        ("samples", f"{new} new, {count(result.num_known)} known"),
    ]
    if result.num_refused:
        rows.append(("not taken", f"{count(result.num_refused)} rows"))
    if result.num_appended:
        made = "from text" if result.num_recomputed else "as in the file"
        rows += [
            ("rounds", f"{result.first_round} to {result.last_round}"),
            ("token ids", made),
            ("scores", foreign(", ".join(f"{n} ({count(c)})" for n, c in result.scores.items()))),
            ("of the prompt", foreign(_listed(result.prompt_metadata))),
            ("of the sample", foreign(_listed(result.sample_metadata))),
        ]
    if is_dry_run:
        rows += [
            (
                f"example {number}",
                continued(example.prompt_text, example.completion_text),
            )
            for number, example in enumerate(result.examples, start=1)
        ]
    console.print(figures(rows))

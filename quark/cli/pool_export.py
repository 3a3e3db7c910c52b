"""``quark pool export``: writes samples to a file, or as a training set."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, opened

_KINDS = ("sft", "dpo", "kto", "reward")
_RULES = {
    "score": _KINDS,
    "top": ("sft", "kto"),
    "bottom": ("kto",),
    "min_margin": ("dpo", "reward"),
    "max_per_prompt": _KINDS,
    "test_share": _KINDS,
    "seed": _KINDS,
}
"""The rules of each kind of training set."""


def export(
    path: PoolPath,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The file: .parquet, .jsonl or .arrow. With --as, the folder.",
            show_default=False,
        ),
    ],
    where: Annotated[
        str | None,
        typer.Option(
            help="Export only samples for which this SQL condition holds.", show_default=False
        ),
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="|".join(_KINDS),
            help="Write a training set in TRL's layout.",
            show_default=False,
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="Score column to choose by. Default: reward.", show_default=False),
    ] = None,
    top: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Positive share (sft, kto). Default: 0.2.", show_default=False
        ),
    ] = None,
    bottom: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Negative share (kto). Default: all others.", show_default=False
        ),
    ] = None,
    min_margin: Annotated[
        float | None,
        typer.Option(
            help="Minimum difference of scores in a pair (dpo, reward).", show_default=False
        ),
    ] = None,
    max_per_prompt: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of samples of each label, or of pairs, per prompt.",
            show_default=False,
        ),
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Share of prompts in the test split.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed that chooses the prompts of the test split.", show_default=False
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing file or folder.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write samples to one file, or as a training set for TRL.

    The suffix of the file chooses Parquet, JSON lines or Arrow. The file holds every column of all samples, or of those
    that `--where` keeps, and `quark pool import` can read it. It appears only when it is complete. For some of the
    columns, or for CSV, use `quark pool query PATH "SELECT …" --out FILE`.

    With `--as`, OUT is a folder with `train.parquet`, `test.parquet` and a README that describes the choice of rows.
    `datasets.load_dataset` reads it. Repeated samples and samples without a score are left out, and no prompt is in
    both splits.

    **Examples**

    * `quark pool export runs/demo samples.parquet`

    * `quark pool export runs/demo recent.parquet --where "round >= 40 AND reward > 0.5"`

    * `quark pool export runs/demo pairs --as dpo --min-margin 0.2 --max-per-prompt 4 --test-share 0.05`
    """
    given = {
        "score": score,
        "top": top,
        "bottom": bottom,
        "min_margin": min_margin,
        "max_per_prompt": max_per_prompt,
        "test_share": test_share,
        "seed": seed,
    }
    rules = {name: value for name, value in given.items() if value is not None}
    for name in rules:
        option = f"--{name.replace('_', '-')}"
        if as_ is None:
            raise typer.BadParameter(f"{option} belongs to --as {'|'.join(_RULES[name])}")
        if as_ in _KINDS and as_ not in _RULES[name]:
            raise typer.BadParameter(f"{option} does not belong to --as {as_}")
    if as_ is None:
        _export_rows(path, out, where, force=force, as_json=as_json)
    elif as_ not in _KINDS:
        raise typer.BadParameter(f"--as is one of {', '.join(_KINDS)}, not {as_!r}")
    else:
        _export_set(path, out, as_, rules | {"where": where}, force=force, as_json=as_json)


def _export_rows(path: Path, out: Path, where: str | None, *, force: bool, as_json: bool) -> None:
    from quark.cli.console import count, make_console, print_json, prose, size
    from quark.pool.export import export_pool

    with opened(path) as pool:
        num_samples = export_pool(pool, out, where=where, is_overwriting=force)
        snapshot = pool.snapshot
    num_bytes = out.stat().st_size
    if as_json:
        print_json(
            {
                "out": out,
                "samples": num_samples,
                "bytes": num_bytes,
                "snapshot": dataclasses.asdict(snapshot),
            }
        )
    else:
        line = f"wrote {count(num_samples)} samples to {out} ({size(num_bytes)})"
        make_console().print(prose(line, "green"), soft_wrap=True)


def _export_set(
    path: Path, out: Path, kind: str, rules: dict[str, object], *, force: bool, as_json: bool
) -> None:
    from quark.cli.console import count, make_console, number, print_json, prose
    from quark.interchange.training_sets import SetKind, SetRules, export_training_set

    with opened(path) as pool:
        made = export_training_set(
            pool,
            out,
            SetKind(kind),
            SetRules(**rules),  # type: ignore[arg-type]
            is_overwriting=force,
        )
    if as_json:
        print_json(
            {
                "out": out,
                "as": kind,
                "train": made.num_train,
                "test": made.num_test,
                "prompts": made.num_prompts,
                "samples": made.num_samples,
                "unscored": made.num_unscored,
                "repeated": made.num_repeated,
                "lowest_positive": made.lowest_positive,
                "highest_negative": made.highest_negative,
            }
        )
        return
    line = f"wrote {out}: {count(made.num_train)} rows to train on, {count(made.num_test)} to test"
    line += f", of {count(made.num_prompts)} prompts; positive scores from {number(made.lowest_positive)}"
    if not math.isnan(made.highest_negative):
        line += f", negative ones up to {number(made.highest_negative)}"
    make_console().print(prose(line, "green"), soft_wrap=True)

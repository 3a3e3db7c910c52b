"""``quark reward train --ensemble``: several scorers from one file, for a reward that is an ensemble."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path


def train_ensemble(
    data: Path,
    output: Path,
    *,
    number: int,
    label_noise: float,
    seed: int,
    name: str | None,
    text_field: str,
    target_field: str | None,
    is_penalty: bool,
    held_out_fraction: float,
    l2: float,
    force: bool,
    as_json: bool,
) -> None:
    """Train the members, and tell how good they are and how a run names them."""
    from quark.cli.console import count, figures, make_console, print_json, prose
    from quark.cli.console import number as shown
    from quark.cli.scorer_folder import check_output
    from quark.rewards.ensemble_training import ENSEMBLE_FILE, train_linear_ensemble

    check_output(output, ENSEMBLE_FILE, "an ensemble", force=force)
    progress = make_console(sys.stderr)
    report = train_linear_ensemble(
        data,
        output,
        number=number,
        label_noise=label_noise,
        seed=seed,
        name=name,
        text_field=text_field,
        target_field=target_field,
        is_penalty=is_penalty,
        held_out_fraction=held_out_fraction,
        l2=l2,
        on_progress=lambda text: progress.print(prose(text, "dim")),
    )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    first = report.members[0]
    members = ", ".join(f'"{member.folder}/"' for member in report.members)
    make_console().print(
        figures(
            [
                (
                    "trained on",
                    f"{count(first.num_train)} texts for each member, {count(report.num_flipped)} of the labels "
                    f"flipped; {count(first.num_held_out)} held out",
                ),
                ("AUC of members", ", ".join(shown(member.auc) for member in report.members)),
                ("AUC of their mean", shown(report.auc_of_mean)),
                ("written to", str(report.folder)),
                ("in a run", f'reward.name = "ensemble", reward.members = [{members}]'),
            ]
        ),
        soft_wrap=True,
    )

"""``quark pool explain``: origin, rank and batches of a sample."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quark.cli.pool_path import JsonFlag, PoolPath
from quark.pool.defaults import NUM_QUANTILES

if TYPE_CHECKING:
    from rich.console import Console

    from quark.training.explain import Explanation


def explain(
    path: PoolPath,
    sample: Annotated[
        int, typer.Argument(metavar="ID", min=0, help="Id of the sample.", show_default=False)
    ],
    num_quantiles: Annotated[
        int | None,
        typer.Option(
            "--num-quantiles",
            "-k",
            min=1,
            help=f"Cut today's pool into this many. Default: the run's, or {NUM_QUANTILES}.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Explain the use of a sample: its origin, its rank, and the training steps that learned from it.

    This is computed from the pool and the run's configuration. For a pool without a run directory, the parts that
    need the configuration are left out.

    **Example:**  `quark pool explain runs/demo 17`
    """
    from quark.cli.console import print_json
    from quark.errors import ConfigError
    from quark.training.explain import explain

    try:
        explanation = explain(path, sample, num_quantiles=num_quantiles)
    except IndexError as err:
        raise ConfigError(str(err)) from err
    if as_json:
        print_json(_plain(explanation))
    else:
        _show(explanation)


def _plain(explanation: Explanation) -> dict[str, Any]:
    from quark.pool.info import stored_json

    sample = explanation.sample
    return {
        "id": sample.id,
        "prompt": sample.prompt_text,
        "prompt_tokens": sample.prompt_tokens,
        "prompt_metadata": stored_json(
            sample.prompt_metadata, f"the metadata of sample {sample.id}'s prompt"
        ),
        "completion": sample.completion_text,
        "completion_tokens": sample.completion_tokens,
        "finish_reason": _finish(sample.finish_reason),
        "logprob_policy": sample.logprob_policy,
        "logprob_reference": sample.logprob_reference,
        "logprob_sampled": sample.logprob_sampled,
        "origin": {
            "round": sample.round,
            "chunk": sample.chunk,
            "key": explanation.key,
            "policy_step": sample.policy_step,
            "reward_token": sample.reward_token,
            "seed": sample.seed,
            "settings": stored_json(sample.settings, f"the settings of sample {sample.id}"),
        },
        "snapshot": dataclasses.asdict(explanation.snapshot),
        "num_quantiles": explanation.num_quantiles,
        "scores": {
            standing.column: {
                key: value for key, value in dataclasses.asdict(standing).items() if key != "column"
            }
            for standing in explanation.standings
        },
        "run": explanation.run,
        "rounds": [dataclasses.asdict(use) for use in explanation.rounds],
        "rounds_unknown": explanation.num_rounds_unknown,
    }


def _show(explanation: Explanation) -> None:
    from quark.cli.console import (
        completed,
        count,
        figures,
        foreign,
        grid,
        heading,
        make_console,
        number,
        prose,
    )

    sample = explanation.sample
    console = make_console()
    tokens = sample.completion_tokens.tolist()
    text = sample.completion_text
    if text is None:
        shown = foreign("tokens " + " ".join(map(str, tokens)))
    else:
        shown = foreign(text) if text.strip() else completed(text)
    console.print(
        figures(
            [
                (
                    "sample",
                    f"{sample.id} (the pool has had {count(explanation.snapshot.num_samples)})",
                ),
                ("prompt", foreign(sample.prompt_text)),
                ("completion", shown),
                ("finished by", f"{_finish(sample.finish_reason)}, {len(tokens)} tokens"),
            ]
        )
    )

    console.print()
    console.print(heading("Where it came from"))
    token = str(sample.reward_token) if sample.reward_token >= 0 else "none was given"
    console.print(
        figures(
            [
                ("round", f"{sample.round}, chunk {sample.chunk}"),
                ("key", foreign(explanation.key)),
                ("policy", f"after {count(sample.policy_step)} optimizer steps"),
                ("reward token", token),
                ("log-probability", f"{number(sample.logprob_policy)} nats under the policy"),
                ("", f"{number(sample.logprob_reference)} nats under the reference"),
                ("", f"{number(sample.logprob_sampled)} nats as it was sampled"),
                ("seed", str(sample.seed)),
                ("settings", foreign(sample.settings)),
            ]
        )
    )

    console.print()
    console.print(heading("How it ranks now"))
    table = grid("score", "value", "rank", "of", "tied with", "quantile", right=range(1, 6))
    for standing in explanation.standings:
        rank = standing.rank
        table.add_row(
            foreign(standing.column, limit=64),
            prose(number(standing.score)),
            prose("–" if rank is None else count(rank)),
            prose(count(standing.num_scored)),
            prose("–" if rank is None else count(standing.num_tied - 1)),
            prose(_quantile(standing.quantile, explanation.num_quantiles)),
        )
    console.print(table)

    console.print()
    console.print(heading("What was learnt from it"))
    _show_rounds(console, explanation)


def _show_rounds(console: Console, explanation: Explanation) -> None:
    from quark.cli.console import count, grid, prose

    if explanation.run is None:
        console.print(
            prose("not known: the pool is not in a run directory, whose settings this needs")
        )
        return
    if explanation.num_rounds_unknown:
        left_out = f"not known of {count(explanation.num_rounds_unknown)} of the rounds since it is there, whose snapshots are gone"
        console.print(prose(left_out, "yellow"), soft_wrap=True)
    elif not explanation.rounds:
        console.print(prose("nothing yet: no round of learning has begun since it is there"))
    if not explanation.rounds:
        return
    table = grid("round", "samples", "quantile", "steps whose batch held it", right=(0, 1, 2))
    table.columns[3].no_wrap = False
    for use in explanation.rounds:
        steps = [", ".join(map(str, use.steps))] if use.steps else []
        if use.steps_to_come:
            steps.append("to come: " + ", ".join(map(str, use.steps_to_come)))
        table.add_row(
            prose(str(use.round)),
            prose(count(use.snapshot.num_samples)),
            prose("–" if use.quantile < 0 else str(use.quantile)),
            prose("; ".join(steps) or "none"),
        )
    console.print(table)


def _quantile(quantile: int, num_quantiles: int) -> str:
    return "–" if quantile < 0 else f"{quantile} of 0..{num_quantiles - 1}"


def _finish(reason: int) -> str:
    from quark.types import FinishReason

    return {each.value: each.name.lower() for each in FinishReason}.get(reason, str(reason))

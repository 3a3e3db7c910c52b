"""``quark generate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.checkpoint_option import CheckpointOption
from quark.cli.pool_path import place
from quark.cli.trust import AllowOption

if TYPE_CHECKING:
    from quark.types import Completion


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A run directory, a model folder or a model's name.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt; can be repeated."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File with prompts: JSONL with `prompt`, or text with one prompt per line. `-` reads lines from stdin."
        ),
    ] = None,
    quantile: Annotated[
        str | None,
        typer.Option(
            "--quantile",
            "-q",
            metavar="best|none|0..K-1",
            help="Reward quantile to ask for; 0 is the worst. Default: best.",
            show_default=False,
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Completions per prompt.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length limit, in tokens. Default: the run's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy. Default: the run's.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Nucleus mass, above 0 and at most 1. Default: the run's."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Strength of guidance, by tokens or along the critic as in the run. Default: the run's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    checkpoint: CheckpointOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write the completions here, one JSON object a line.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    allow: AllowOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Write completions under a reward token.

    **Examples**

    * `quark generate runs/demo --prompt "Pros:"`

    * `quark generate runs/demo -p "Pros:" --quantile 0 --num 3` – its worst

    * `quark generate runs/demo -p "Pros:" --quantile none` – the trained model without a token

    * `quark generate embedded:reviews -p "Pros:"` – the original model

    * `quark generate runs/demo --prompts prompts.jsonl --out completions.jsonl`

    * `quark generate runs/demo` – on a terminal: asks for prompts until Ctrl-D
    """
    is_asking = not prompt and prompts is None
    if is_asking and (as_json or out is not None or not _is_terminal()):
        raise typer.BadParameter("give --prompt TEXT or --prompts FILE (`-` is stdin)")
    if out is not None and os.path.lexists(out) and not force:
        raise typer.BadParameter(f"{out} exists: give another name, or --force to replace it")
    from quark.api.trained_model import open_model, say_checkpoint
    from quark.cli.console import make_console, print_json, prose, tell

    source = open_model(model, checkpoint=checkpoint, allow=allow or ())
    say_checkpoint(source, tell)
    sampling, asked = source.asked(
        quantile,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        guidance=guidance,
    )
    generator = source.generator(sampling)
    if is_asking:
        for number, text in enumerate(_typed()):
            asking = [source.prompt(text)] * num
            _show(generator.generate(asking, quantile=asked, seed=seed + number), num)
        return
    asking = [source.prompt(text) for text in prompt or ()]
    if prompts is not None:
        is_stdin = str(prompts) == "-"
        asking += map(source.prompt, _lines()) if is_stdin else source.prompts_of(prompts)
    completions = generator.generate(
        [item for item in asking for _ in range(num)], quantile=asked, seed=seed
    )
    rows = [_row(completion) for completion in completions]
    if out is not None:
        _write(out, rows)
        if not as_json:
            make_console().print(prose(f"wrote {out}", "green"), soft_wrap=True)
            return
    if as_json:
        print_json(
            {
                "model": model,
                "quantile": asked,
                "seed": seed,
                "sampling": sampling.model_dump(mode="json"),
                **({"completions": rows} if out is None else {"out": out}),
            }
        )
        return
    _show(completions, num)


def _row(completion: Completion) -> dict[str, object]:
    return {
        "prompt": completion.prompt.text,
        "text": completion.text,
        "finish_reason": completion.finish_reason.name.lower(),
        "num_tokens": len(completion.token_ids),
        "logprob_policy": completion.logprob_policy,
        "logprob_sampled": completion.logprob_sampled,
    }


def _write(out: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write JSON lines, all or nothing; a number that is not known is null."""
    import json

    from quark.cli.console import to_json
    from quark.publication import publish_file

    lines = (json.dumps(to_json(row), allow_nan=False, ensure_ascii=False) for row in rows)
    publish_file(place(out), "".join(line + "\n" for line in lines))


def _show(completions: Sequence[Completion], num: int) -> None:
    from quark.cli.console import continued, make_console

    console = make_console()
    for index, completion in enumerate(completions):
        if index and index % num == 0:
            console.print()
        text = continued(completion.prompt.text, completion.text)
        console.print(text, soft_wrap=not console.is_terminal)


def _lines() -> list[str]:
    """The prompts on stdin, one a line. Raises ConfigError where there is none."""
    from quark.errors import ConfigError

    lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise ConfigError("--prompts -: stdin has no prompts, one on each line")
    return lines


def _typed() -> Iterator[str]:
    """Prompts that a person types, until the end of the input."""
    while True:
        sys.stderr.write("prompt> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            sys.stderr.write("\n")
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()

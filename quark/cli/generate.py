"""``quark generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quark.cli.trained_model import TrainedModel
    from quark.types import Prompt


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
            help="File with prompts: JSONL with `prompt`, or text with one prompt per line."
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
            min=0.0, help="Strength of guidance away from the worst token. Default: the run's."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
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
    """
    if not prompt and prompts is None:
        raise typer.BadParameter("give --prompt TEXT or --prompts FILE")
    from quark.cli.console import continued, make_console, print_json
    from quark.cli.trained_model import open_model, overridden

    source = open_model(model)
    asked = source.quantile(quantile)
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "guidance": guidance if guidance is not None else _picked_guidance(source),
    }
    sampling = overridden(
        source.config.sampling, {key: value for key, value in given.items() if value is not None}
    )
    asking = [_tokenized(source, text) for text in prompt or ()]
    if prompts is not None:
        asking += source.prompts_of(prompts)
    completions = source.generator(sampling).generate(
        [item for item in asking for _ in range(num)], quantile=asked, seed=seed
    )
    if as_json:
        print_json(
            {
                "model": model,
                "quantile": asked,
                "seed": seed,
                "sampling": sampling.model_dump(mode="json"),
                "completions": [
                    {
                        "prompt": completion.prompt.text,
                        "text": completion.text,
                        "finish_reason": completion.finish_reason.name.lower(),
                        "num_tokens": len(completion.token_ids),
                        "logprob_policy": completion.logprob_policy,
                        "logprob_sampled": completion.logprob_sampled,
                    }
                    for completion in completions
                ],
            }
        )
        return
    console = make_console()
    for index, completion in enumerate(completions):
        if index and index % num == 0:
            console.print()
        text = continued(completion.prompt.text, completion.text)
        console.print(text, soft_wrap=not console.is_terminal)


def _picked_guidance(source: TrainedModel) -> float | None:
    """The strength that `quark frontier --pick` stored in a run; None without one."""
    if not source.is_run:
        return None
    from quark.evaluation.frontier_file import FrontierFile
    from quark.run_directory import RunDirectory

    kept = FrontierFile.read(RunDirectory(Path(source.name)))
    return None if kept is None else kept.picked


def _tokenized(source: TrainedModel, text: str) -> Prompt:
    from quark.errors import DataError
    from quark.types import Prompt

    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise DataError(f"--prompt {text!r} is not UTF-8") from err
    token_ids = tuple(source.tokenizer.encode(text))
    return source.checked(Prompt(index=0, text=text, token_ids=token_ids))

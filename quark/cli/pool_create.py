"""``quark pool create``: an empty pool for your own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, place


def create(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A directory that does not exist yet.", show_default=False
        ),
    ],
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, max=2**32 - 1, help="Token ids are below this.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="Take the vocabulary size from this model's tokenizer.",
            show_default=False,
        ),
    ] = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Store only tokens, without the text of completions.")
    ] = False,
    tie_seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="Seed of the hash that orders equal scores.")
    ] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Create an empty pool, to be filled from Python (docs/pool.md).

    A run creates its own pool. Use this for samples from elsewhere.

    **Examples**

    * `quark pool create samples --vocab-size 50257`

    * `quark pool create samples --tokenizer embedded:reviews --no-text`
    """
    if (vocab_size is None) == (tokenizer is None):
        raise typer.BadParameter("give either --vocab-size N or --tokenizer NAME_OR_FOLDER")
    from quark.cli.console import count, make_console, print_json, prose
    from quark.errors import ConfigError
    from quark.pool.native import NativePool

    size = vocab_size if tokenizer is None else _vocab_size_of(tokenizer)
    assert size is not None
    try:
        pool = NativePool.create(
            place(path),
            vocab_size=size,
            store_text=not no_text,
            tie_seed=tie_seed,
            metadata={} if tokenizer is None else {"tokenizer": tokenizer},
        )
    except FileExistsError as err:
        raise ConfigError(f"{path} exists: give another name") from err
    with pool:
        facts = pool.info()
    if as_json:
        print_json(
            {
                "path": facts.path,
                "uuid": facts.uuid,
                "vocab_size": facts.vocab_size,
                "store_text": facts.store_text,
                "tie_seed": facts.tie_seed,
                "metadata": facts.metadata,
            }
        )
        return
    kept = "tokens only" if no_text else "tokens and text"
    line = f"made {path}: {count(facts.vocab_size)} tokens in the vocabulary, keeps {kept}"
    make_console().print(prose(line, "green"), soft_wrap=True)


def _vocab_size_of(name: str) -> int:
    from quark.models.config import ModelConfig
    from quark.models.loading import load_tokenizer, vocab_size_of

    return vocab_size_of(load_tokenizer(ModelConfig(name=name)))

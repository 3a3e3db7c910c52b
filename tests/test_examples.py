"""The examples run as they stand, one after the other in one folder, without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
IN_ORDER = ("train_with_a_lambda", "score_again", "preference_pairs", "why_this_sample")
NEEDS_NBCLIENT = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel")),
    reason="nbclient and ipykernel are not installed",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples have run."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, str]:
    """The output of every script that needs no other trainer."""
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in IN_ORDER:
            lines: list[str] = []
            patch.setattr(
                "builtins.print",
                lambda *words, into=lines, **_: into.append(" ".join(map(str, words))),
            )
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            said[name] = "\n".join(lines)
    return said


def test_a_model_is_trained_on_a_lambda(printed: dict[str, str]) -> None:
    first, *completions = printed["train_with_a_lambda"].splitlines()[-4:]
    before, after = map(int, re.findall(r"\d+", first))
    assert after < before, "it was asked for short texts"
    assert all(text.startswith("The battery") for text in completions)


def test_samples_are_scored_again_and_learned_from(printed: dict[str, str], folder: Path) -> None:
    assert "cheerful" in printed["score_again"]
    assert re.search(r"step 0: -?\d\.\d+ nats\nstep 8: ", printed["score_again"])
    assert (folder / "cheerful").is_dir()


def test_pairs_are_made_for_dpo(printed: dict[str, str], folder: Path) -> None:
    num_train, num_test, _ = map(int, re.findall(r"\d+", printed["preference_pairs"])[:3])
    pairs = pl.read_parquet(folder / "pairs" / "train.parquet")
    assert pairs.height == num_train > 10
    assert num_test > 0
    assert (pairs["score_chosen"] >= pairs["score_rejected"] + 5.0).all()


def test_a_sample_is_explained(printed: dict[str, str]) -> None:
    said = printed["why_this_sample"]
    assert re.search(r"rank \d+ of 160, quantile 0 of 4", said)
    assert re.search(r"round 0 saw it as quantile 0, in the batches of steps \[\d", said)


def test_every_example_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"\]\(([\w.]+)\)", page)) == files
    assert {f"{name}.py" for name in IN_ORDER} < files


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_grpo_keeps_its_rollouts_in_a_pool(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for _ in range(2):  # the second one has nothing left to do, and says the same
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "beside_trl.py")],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.findall(r"│ (\d) +┆ (\d) +┆", done.stdout) == [("0", "4"), ("1", "4")]


@NEEDS_NBCLIENT
def test_the_notebook_shows_progress_and_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), *sys.path]))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    # A kernel of this interpreter, whatever kernels the machine has.
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    said = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(said))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "it is kept without results"
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    training, rounds, samples, completions = [
        cell.outputs for cell in notebook.cells if cell.cell_type == "code"
    ]
    [box] = [
        output.data["text/html"] for output in training if output.output_type == "display_data"
    ]
    assert "<progress" in box
    assert re.search(r"<tr><td>1</td><td>-\d+\.\d+</td>", box), "the last round has a row"
    streams = [output.text for output in training if output.output_type == "stream"]
    # tqdm says at its import that ipywidgets are missing.
    assert [text for text in streams if "TqdmWarning" not in text] == [], "all is in the box"
    assert "quark.Run(" in training[-1].data["text/plain"]
    assert "reward_mean" in rounds[0].data["text/html"]
    assert "completion_text" in samples[0].data["text/html"]
    assert completions[0].data["text/plain"].startswith("[")

"""The page on adding a method is run as it stands: a reward, an objective and a reference, each by a whole run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quark.config.load import load_config
from quark.training import factories, rooms
from quark.training.assemble import assemble
from quark.training.state.checkpoint import Checkpoints
from tests.tiny import save_tiny, tiny_gpt2
from tests.training.tiny_run import Listener, rows_of, train, write_inputs

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with the files of the page."""
    folder = tmp_path / "methods"
    folder.mkdir()
    blocks = re.findall(
        r"```python file=(\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert {name for name, _ in blocks} == {"exclaim.py", "reward_weighted.py", "other_model.py"}
    for name, text in blocks:
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reward_scores_a_run(files: Path, tmp_path: Path) -> None:
    exclaim = load(files / "exclaim.py").exclaim
    assert exclaim(prompts=["", ""], completions=["a!", ""]) == [0.5, 0.0]
    name = f"reward.name={files / 'exclaim.py'}:exclaim"
    assert not train(write_inputs(tmp_path), tmp_path / "run", overrides=(name,)).interrupted
    assert all(
        row["failed_scores"] == 0 for row in rows_of(tmp_path / "run") if row["event"] == "round"
    )


def test_the_objective_trains_and_resumes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "QuarkObjective", load(files / "reward_weighted.py").RewardWeighted)
    config, run_dir = write_inputs(tmp_path), tmp_path / "run"
    for num_rounds in (1, 2):
        loaded = load_config(config, (f"run.num_rounds={num_rounds}",))
        trainer = assemble(loaded, run_dir, listener=Listener())
        before = trainer._learning.policy.reward_vectors.clone()
        trainer.run()
        assert not torch.equal(before, trainer._learning.policy.reward_vectors)
    steps = [row for row in rows_of(run_dir) if row["event"] == "step"]
    assert [row["steps_taken"] for row in steps] == list(range(len(steps)))
    assert all(row["weight"] >= 0.0 for row in steps)
    assert any(row["weight"] > 0.0 for row in steps)
    newest, _ = Checkpoints(run_dir / "checkpoints", keep_last=2).newest()
    assert newest is not None
    assert newest.state.objective == {"steps_taken": len(steps)}


def test_the_reference_anchors_a_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load(files / "other_model.py").OtherModel
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(3.0)
    folder = save_tiny(tmp_path / "other", model)
    config = write_inputs(tmp_path)
    train(config, tmp_path / "own")
    monkeypatch.setattr(factories, "build_reference", lambda *_, **__: other(str(folder)))
    train(config, tmp_path / "anchored")
    first = [
        next(row for row in rows_of(tmp_path / name) if row["event"] == "step")
        for name in ("own", "anchored")
    ]
    # The policy begins as the model that it is measured against, or as far from it as another one is.
    assert first[1]["kl_reference_to_policy"] > 2 * first[0]["kl_reference_to_policy"]

"""Ensembles of linear scorers: bootstrap samples, wrong labels, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark.rewards.build import build_reward
from quark.rewards.config import RewardConfig
from quark.rewards.ensemble import EnsembleReward
from quark.rewards.label_noise import with_label_noise
from quark.rewards.linear_training import LabelledText
from tests.cli.commands import quark

GOOD, BAD = ["great", "lovely", "easy", "happy"], ["awful", "broken", "sad", "poor"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    rows = []
    for label, words in ((1, GOOD), (0, BAD)):
        for _ in range(150):
            text = " ".join(random.choice([*words, "the", "a", "it", "so"], size=6))
            rows.append({"text": f"{text} {random.integers(10**6)}", "label": label})
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scorers") / "noisy"
    arguments = ["--ensemble", "2", "--label-noise", "0.25", "--held-out-fraction", "0.2"]
    done = quark("reward", "train", str(data), "-o", str(folder), *arguments, "--json")
    assert done.code == 0, done.err
    return folder, done.json


def test_the_members_differ_and_a_quarter_of_the_labels_is_wrong(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    folder, report = trained
    [first, second] = report["members"]
    assert report["num_flipped"] / first["num_train"] == pytest.approx(0.25, abs=0.08)
    assert (first["num_train"], first["num_held_out"]) == (
        second["num_train"],
        second["num_held_out"],
    )
    weights = [(folder / str(n) / "weights.safetensors").read_bytes() for n in (1, 2)]
    assert weights[0] != weights[1]
    assert 0.5 < report["auc_of_mean"] <= 1.0
    said = json.loads((folder / "ensemble.json").read_text())
    assert (said["members"], said["label_noise"]) == (["1", "2"], 0.25)


def test_a_run_can_name_the_folders_as_members(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    members = (f"{folder}/1/", f"{folder}/2/")
    reward = build_reward(RewardConfig(name="ensemble", members=members))
    assert isinstance(reward, EnsembleReward)
    texts = ["great and lovely", "awful and broken"]
    scores = [
        build_reward(RewardConfig(name=name))(prompts=["", ""], completions=texts)
        for name in members
    ]
    expected = np.mean(np.array(scores, dtype=np.float64), axis=0)
    assert reward(prompts=["", ""], completions=texts) == pytest.approx(expected, rel=1e-6)
    assert [m(prompts=["", ""], completions=texts) for m in reward.members] == [
        pytest.approx(column) for column in scores
    ]
    assert {name.split("/")[0] for name in reward.provenance["files"]} == {"1", "2"}  # type: ignore[union-attr]


def test_wrong_labels_are_drawn_once_for_all_members_and_follow_from_the_seed() -> None:
    examples = [LabelledText(text=f"text {i}", target=float(i % 2)) for i in range(4000)]
    noisy = with_label_noise(examples, 0.25, seed=1)
    wrong = [a.target != b.target for a, b in zip(examples, noisy, strict=True)]
    assert np.mean(wrong) == pytest.approx(0.25, abs=0.02)
    assert all(
        b.target == 1 - a.target for a, b, w in zip(examples, noisy, wrong, strict=True) if w
    )
    # A text has the same label wherever it stands, and so in every bootstrap sample.
    assert with_label_noise(examples[::-1], 0.25, seed=1) == noisy[::-1]
    assert with_label_noise(examples, 0.25, seed=2) != noisy
    assert with_label_noise(examples, 0.0, seed=1) == examples


def test_an_ensemble_is_not_replaced_without_consent(
    data: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = trained
    again = quark("reward", "train", str(data), "-o", str(folder), "--ensemble", "2")
    assert again.code != 0
    assert "--force" in again.err
    alone = quark("reward", "train", str(data), "-o", str(folder / "x"), "--label-noise", "0.1")
    assert alone.code != 0
    assert "--ensemble" in alone.err


def test_a_member_without_a_score_leaves_the_ensemble_without_one(tmp_path: Path) -> None:
    file = tmp_path / "members.py"
    file.write_text(
        "def whole(prompts, completions):\n    return [1.0 for _ in completions]\n"
        "def gaps(prompts, completions):\n"
        "    return [None if 'x' in text else 3.0 for text in completions]\n"
    )
    reward = build_reward(RewardConfig(name="ensemble", members=(f"{file}:whole", f"{file}:gaps")))
    assert reward(prompts=["", ""], completions=["a", "x"]) == [2.0, None]

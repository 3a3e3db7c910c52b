"""A classifier fine-tuned from labeled texts: figures, files, and its use as a reward."""

import dataclasses
import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from quark.cli.app import run
from quark.errors import DataError, ModelError, RewardError
from quark.rewards.build import (
    build_reward,
    is_same_scorer,
    reward_content,
    scorer_hash,
)
from quark.rewards.classifier import TrainedClassifier
from quark.rewards.classifier_training import Calibration, ClassifierTraining, train_classifier
from quark.rewards.config import RewardConfig
from tests.rewards.test_classifier import save_classifier
from tests.tiny import save_tiny

TRAINING = ClassifierTraining(epochs=4, learning_rate=3e-3, batch_size=16, max_length=16)


def write_texts(path, *, num=240):
    """Texts whose label is that of their only vowel, the last letter."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num):
        letters = "".join(rng.choice(list("bcdfghk"), 5))
        rows.append({"text": letters + ("a" if index % 2 else "e"), "label": index % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def trained(data, encoder, tmp_path_factory):
    """The report of a training, and what was said meanwhile."""
    folder = tmp_path_factory.mktemp("trained") / "vowel"
    said = []
    training = dataclasses.replace(TRAINING, encoder=encoder)
    report = train_classifier(
        data, folder, training, held_out_fraction=0.2, on_progress=said.append
    )
    return report, said


def test_training_finds_the_letter_that_decides(trained, data):
    report, said = trained
    assert report.auc > 0.9
    assert report.accuracy > 0.8
    assert report.num_train + report.num_held_out == 240
    assert report.num_trained == report.num_parameters
    assert report.data_sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    assert [line for line in said if line.startswith("epoch")][-1].startswith("epoch 4 of 4: loss")


def test_the_folder_is_one_of_transformers_with_a_card(trained):
    report, _ = trained
    names = {path.name for path in report.folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "scorer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    card = (report.folder / "README.md").read_text()
    for expected in (report.data_sha256, f"{report.auc:.4f}", f"{report.calibration.error:.4f}"):
        assert expected in card


def test_the_reward_is_the_probability_that_transformers_gives(trained):
    report, _ = trained
    texts = ["bcdka", "bcdke", "", "kkkka", "e"]
    reward = build_reward(RewardConfig(name=str(report.folder)))
    assert isinstance(reward, TrainedClassifier)
    assert reward.name == "vowel"
    found = reward(prompts=[""] * 5, completions=texts)
    assert found[2] is None
    tokenizer = AutoTokenizer.from_pretrained(report.folder)
    model = AutoModelForSequenceClassification.from_pretrained(report.folder).eval()
    for text, score in zip(texts, found, strict=True):
        if text:
            with torch.inference_mode():
                logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
            assert score == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-5)
    assert found[0] > 0.5 > found[1]


def test_the_scores_carry_the_hash_of_the_scorer(trained, tmp_path):
    report, _ = trained
    reward = build_reward(RewardConfig(name=str(report.folder)))
    assert {"model.safetensors", "config.json", "scorer.json"} <= reward_content(reward).keys()
    assert len(scorer_hash(reward)) == 64


def test_a_penalty_is_the_probability_of_the_other_label(data, trained, encoder, tmp_path):
    training = dataclasses.replace(TRAINING, encoder=encoder, epochs=1)
    train_classifier(data, tmp_path / "bad", training, held_out_fraction=0.2, is_penalty=True)
    reward = build_reward(RewardConfig(name=f"{tmp_path}/bad"))
    assert reward.provenance["label"] == "not bad"


def test_a_frozen_encoder_keeps_its_weights(data, tmp_path):
    source = tmp_path / "bert"
    source.mkdir()
    save_classifier(source)
    training = dataclasses.replace(TRAINING, encoder=str(source), is_frozen=True, epochs=1)
    report = train_classifier(data, tmp_path / "head", training, held_out_fraction=0.2)
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (source, tmp_path / "head")
    )
    changed = {key.split(".")[-2] for key in after if not torch.equal(before[key], after[key])}
    assert changed == {"classifier"} | (
        {"dense"} if any("pooler" in key for key in after) else set()
    )
    assert 0 < report.num_trained < report.num_parameters / 2


def test_calibration_equals_values_computed_by_hand():
    scores, targets = np.array([0.05, 0.91, 0.99, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    found = Calibration.of(scores, targets)
    assert found.bins[0] == (0.05, 0.0, 1)
    assert found.bins[1] == (pytest.approx(2.9 / 3), pytest.approx(2 / 3), 3)
    assert found.error == pytest.approx((0.05 + 3 * (2.9 / 3 - 2 / 3)) / 4)
    assert found.brier == pytest.approx((0.05**2 + 0.09**2 + 0.99**2) / 4)
    assert math.isnan(Calibration.of(np.array([]), np.array([])).error)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"}', "no field 'score'"),
        ('{"text": "a", "label": 2}', r"'label' must be a number in \[0, 1\]"),
        ('{"label": 1, "body": "a"}', "no field 'text'; there is: 'label', 'body'"),
        ("[]", "a JSON object is needed"),
        ('{"text": "\\ud800", "label": 1}', "'text' holds half of a character"),
        ('{"text": "a", "label": NaN}', r"'label' must be a number in \[0, 1\]"),
        (f'{{"text": "a", "label": {10**400}}}', r"'label' must be a number in \[0, 1\]"),
        (f'{{"text": "{"x" * (1 << 20)}y", "label": 1}}', "the text has 1,048,577 bytes"),
    ],
)
def test_data_of_another_layout_is_an_error_that_names_the_line(tmp_path, encoder, line, said):
    path = tmp_path / "other.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=rf"other\.jsonl:1: .*{said}"):
        train_classifier(path, tmp_path / "new", dataclasses.replace(TRAINING, encoder=encoder))
    assert not (tmp_path / "new").exists()


def test_a_pipe_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        train_classifier(tmp_path / "pipe.jsonl", tmp_path / "new", TRAINING)


def test_a_missing_encoder_is_named(tmp_path, data):
    training = dataclasses.replace(TRAINING, encoder=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="nowhere"):
        train_classifier(data, tmp_path / "new", training)


def test_a_scorer_file_of_another_kind_is_named(trained, tmp_path):
    (tmp_path / "scorer.json").write_text('{"format": "quark-classifier-scorer-1", "name": "x"}')
    with pytest.raises(RewardError, match=r"scorer\.json: label"):
        build_reward(RewardConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--epochs", "2"], "--epochs does not apply to --kind linear"),
        (["--frozen"], "--frozen does not apply to --kind linear"),
        (["--kind", "classifier", "--l2", "2"], "--l2 does not apply to --kind classifier"),
    ],
)
def test_an_option_of_the_other_kind_is_refused(tmp_path, data, option, said, capsys):
    assert run(["reward", "train", str(data), "--output", str(tmp_path / "s"), *option]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_command_trains_one_and_says_how_good_it_is(tmp_path, data, encoder, capsys):
    arguments = ["--kind", "classifier", "--encoder", encoder, "--epochs", "1", "--json"]
    output = str(tmp_path / "s")
    assert run(["reward", "train", str(data), "--output", output, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"auc", "calibration", "data_sha256", "num_held_out"} <= report.keys()


def test_two_rewards_of_one_scorer_are_known_to_be_the_same(trained, tmp_path):
    report, _ = trained
    folder = str(report.folder)
    trained_one = build_reward(RewardConfig(name=folder))
    other_label = build_reward(
        RewardConfig(name="classifier", classifier={"model": folder, "label": "not vowel"})
    )
    assert is_same_scorer(trained_one, other_label)
    for name in ("sentiment", "vader", "length"):
        built = build_reward(RewardConfig(name=name))
        assert is_same_scorer(built, build_reward(RewardConfig(name=name)))
        joined = build_reward(RewardConfig(name=name, input="prompt_and_completion"))
        assert is_same_scorer(built, joined)
        assert not is_same_scorer(built, trained_one)
        assert not is_same_scorer(built, build_reward(RewardConfig(name="toxicity")))

"""The linear scorer: features, training, files, and the two that ship."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quark.assets import asset_path
from quark.errors import DataError, RewardError
from quark.rewards.hashed_features import TextBatch, character_ngrams, word_ngrams
from quark.rewards.held_out_report import area_under_roc, mean_ranks
from quark.rewards.linear import SETTINGS_FILE, WEIGHTS_FILE, LinearReward, LinearScorer
from quark.rewards.linear_training import (
    read_labelled_texts,
    train_linear_scorer,
)
from tests.shared_data import shared_data

BITS = 20
TEXT = st.text(max_size=40)


def features_of(texts, index):
    batch = TextBatch.of(texts)
    return [
        sorted(found.index[found.text == index].tolist())
        for found in character_ngrams(batch, BITS) + word_ngrams(batch, BITS)
    ]


@given(st.lists(TEXT, min_size=1, max_size=6), st.data())
def test_features_of_a_text_do_not_depend_on_its_neighbours(texts, data):
    index = data.draw(st.integers(0, len(texts) - 1))
    assert features_of(texts, index) == features_of([texts[index]], 0)


def index_of_characters(run):
    """The feature of a run of bytes, hashed one after another."""
    rolling = 0
    for byte in run:
        rolling = (rolling * 0x9E3779B1 + byte) % 2**32
    mixed = (rolling ^ rolling >> 15) * 0x85EBCA6B % 2**32
    return mixed >> (32 - BITS)


def index_of_words(*words):
    """The feature of a word or of two neighbors."""
    hashed = 0
    for word in words:
        powers = ((0x9E3779B97F4A7C15**place, byte) for place, byte in enumerate(word.encode()))
        hashed = hashed * 0xC2B2AE3D27D4EB4F + sum(power * byte for power, byte in powers)
    hashed %= 2**64
    mixed = (hashed ^ hashed >> 29) * 0xD6E8FEB86659FD93 % 2**64
    return mixed >> (64 - BITS)


@given(st.lists(st.text("ab 'é", max_size=12), min_size=1, max_size=4))
def test_ngrams_are_those_a_plain_loop_finds(texts):
    """Exactly these features, as often as the n-grams occur."""
    batch = TextBatch.of(texts)
    characters, words = character_ngrams(batch, BITS), word_ngrams(batch, BITS)
    for index, text in enumerate(texts):
        padded = f" {' '.join(text.split())} ".encode()
        for order, found in zip((2, 3, 4, 5), characters, strict=True):
            runs = [padded[i : i + order] for i in range(len(padded) - order + 1)]
            expected = [run for run in runs if run.strip() and b" " not in run[1:-1]]
            indices = found.index[found.text == index].tolist()
            assert indices == [index_of_characters(run) for run in expected]
        names = text.split()
        assert words[0].index[words[0].text == index].tolist() == [*map(index_of_words, names)]
        pairs = words[1].index[words[1].text == index].tolist()
        assert pairs == [index_of_words(*pair) for pair in pairwise(names)]


def test_case_and_runs_of_spaces_do_not_matter():
    assert features_of(["Easy  to\nUSE "], 0) == features_of(["easy to use"], 0)


def test_word_order_matters():
    assert features_of(["not good but cheap"], 0) != features_of(["not cheap but good"], 0)


@given(st.lists(TEXT, min_size=1, max_size=8))
def test_scores_are_probabilities_and_independent_of_the_batch(texts):
    scorer = LinearScorer.load(asset_path("rewards", "sentiment"))
    together = scorer.score_texts(texts)
    assert together.dtype == np.float32
    assert ((together > 0) & (together < 1)).all()
    assert together.tolist() == [float(scorer.score_texts([text])[0]) for text in texts]


def test_no_texts_are_no_scores():
    assert LinearScorer.load(asset_path("rewards", "sentiment")).score_texts([]).shape == (0,)


def test_the_toxicity_reward_is_one_minus_toxicity():
    folder = asset_path("rewards", "toxicity")
    texts = ["have a nice day", "you stupid idiot"]
    kind, rude = LinearReward.load(folder)(prompts=["", ""], completions=texts)
    assert kind > 0.7 > 0.3 > rude
    toxicity = LinearScorer.load(folder).score_texts(texts)
    assert [kind, rude] == (np.float32(1) - toxicity).tolist()


def write_examples(path, *, num=400, target="label"):
    """Texts whose label follows from one word."""
    rng = np.random.default_rng(0)
    fillers = ["camera", "phone", "menu", "zoom", "very", "rather", "the", "with"]
    with path.open("w") as lines:
        for index in range(num):
            label = index % 2
            words = [*rng.choice(fillers, 4), "superb" if label else "awful", str(index)]
            lines.write(json.dumps({"text": " ".join(words), target: label}) + "\n")
    return path


def test_training_finds_the_word_that_decides(tmp_path):
    data = write_examples(tmp_path / "examples.jsonl")
    told = []
    report = train_linear_scorer(data, tmp_path / "scorer", on_progress=told.append)
    assert report.auc == 1.0
    assert report.accuracy == 1.0
    assert report.num_train + report.num_held_out == 400
    assert told
    reward = LinearReward.load(tmp_path / "scorer")
    assert reward.name == "scorer"
    good, bad = reward(prompts=["", ""], completions=["superb menu", "awful menu"])
    assert good > 0.8 > 0.2 > bad
    assert f"{report.auc:.4f}" in (tmp_path / "scorer" / "README.md").read_text()


def test_training_twice_gives_the_same_bytes(tmp_path):
    data = write_examples(tmp_path / "examples.jsonl")
    for folder in ("a", "b"):
        train_linear_scorer(data, tmp_path / folder, name="same")
    for file in (WEIGHTS_FILE, SETTINGS_FILE, "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_scores_as_targets_and_other_field_names(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"body": "a", "rate": 0.25}\n\n{"body": "b", "rate": 1}\n')
    found = read_labelled_texts(path, text_field="body", target_field="rate")
    assert [(example.text, example.target) for example in found] == [("a", 0.25), ("b", 1.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('{"text": "\udcff", "label": 1}', "not UTF-8"),
        ("[" * 100_000, "nested more than 64 levels"),
        ("[1]", "a JSON object is needed"),
        ('{"label": 1}', "no field 'text'"),
        ('{"text": "a"}', "no field 'score'"),
        ('{"text": 3, "label": 1}', "must be a text"),
        ('{"text": "a", "label": 2}', r"a number in \[0, 1\], not 2"),
        ('{"text": "a", "label": NaN}', "not nan"),
        ('{"text": "a", "label": "1"}', "not '1'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=rf"bad\.jsonl:1: .*{message}"):
        read_labelled_texts(path)


def test_too_few_texts_or_one_class_is_an_error(tmp_path):
    with pytest.raises(DataError, match="at least 20"):
        train_linear_scorer(write_examples(tmp_path / "few.jsonl", num=30), tmp_path / "s")
    one_class = tmp_path / "one.jsonl"
    one_class.write_text("".join(f'{{"text": "t {i}", "label": 1}}\n' for i in range(400)))
    with pytest.raises(DataError, match=r"every target is 1\.0"):
        train_linear_scorer(one_class, tmp_path / "s")


def damaged(tmp_path, change):
    folder = tmp_path / "scorer"
    LinearScorer.load(asset_path("rewards", "sentiment")).save(folder)
    change(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / WEIGHTS_FILE).unlink(), "does not hold a linear scorer"),
        (lambda f: (f / SETTINGS_FILE).write_text("{}"), "does not hold a linear scorer"),
        (
            lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-7]),
            "does not hold a linear scorer",
        ),
        (
            lambda f: (f / SETTINGS_FILE).write_text(
                (f / SETTINGS_FILE).read_text().replace("scorer-1", "scorer-9")
            ),
            "scorer-9",
        ),
        (
            lambda f: (f / SETTINGS_FILE).write_text(
                (f / SETTINGS_FILE).read_text().replace("20", "12")
            ),
            "index past 4096",
        ),
    ],
)
def test_a_damaged_scorer_is_refused(tmp_path, change, message):
    folder = damaged(tmp_path, change)
    with pytest.raises(RewardError, match=message):
        LinearScorer.load(folder)


def test_saving_and_loading_keeps_every_score(tmp_path):
    scorer = LinearScorer.load(asset_path("rewards", "sentiment"))
    scorer.save(tmp_path / "copy")
    texts = ["easy to use", "poor battery life", ""]
    copied = LinearScorer.load(tmp_path / "copy").score_texts(texts)
    assert copied.tolist() == scorer.score_texts(texts).tolist()


def test_area_under_roc_by_hand():
    scores, labels = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True])
    # Pairs (positive, negative): 0.4 > 0.1, 0.4 = 0.4 (half), 0.8 > both.
    assert area_under_roc(scores, labels) == 3.5 / 4
    assert mean_ranks(scores).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert math.isnan(area_under_roc(scores, np.ones(4, dtype=bool)))


def test_sentiment_tells_pros_from_cons_of_phrases_it_has_not_seen():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
    try:
        from review_corpus import load_phrases
    finally:
        sys.path.pop(0)
    phrases = [p for p in load_phrases(shared_data("product_pros_cons.jsonl")) if p.is_held_out]
    scores = LinearScorer.load(asset_path("rewards", "sentiment")).score_texts(
        [phrase.text for phrase in phrases]
    )
    labels = np.array([phrase.label == 1 for phrase in phrases])
    assert area_under_roc(scores.astype(np.float64), labels) >= 0.98
    assert len(np.unique(scores)) > 0.99 * len(scores)
    assert abs(float(scores.mean()) - labels.mean()) < 0.02


def test_sentiment_carries_over_to_movie_sentences():
    rows = [
        json.loads(line)
        for line in shared_data("movie_sentence_polarity.jsonl").read_text().splitlines()
    ]
    scores = LinearScorer.load(asset_path("rewards", "sentiment")).score_texts(
        [row["text"] for row in rows]
    )
    labels = np.array([row["label"] == 1 for row in rows])
    assert area_under_roc(scores.astype(np.float64), labels) > 0.6


def test_toxicity_agrees_with_the_recorded_scores_of_texts_it_has_not_seen():
    import hashlib

    texts, truth = [], []
    for line in shared_data("realtoxicityprompts_4k.jsonl").read_text().splitlines():
        row = json.loads(line)
        digest = hashlib.sha256(row["prompt"].encode()).digest()
        if int.from_bytes(digest[:4], "little") % 10:
            continue
        for part in ("prompt", "continuation"):
            score = row[f"{part}_scores"]["toxicity"]
            if score is not None:
                texts.append(row[part])
                truth.append(score)
    scores = LinearScorer.load(asset_path("rewards", "toxicity")).score_texts(texts)
    assert len(texts) > 700
    assert area_under_roc(scores.astype(np.float64), np.array(truth) >= 0.5) >= 0.93
    assert np.corrcoef(scores, truth)[0, 1] > 0.8


def test_too_few_examples_are_counted_in_plain_words(tmp_path):
    data = tmp_path / "examples.jsonl"
    data.write_text('{"text": "a", "label": 1, "split": "train"}\n')
    with pytest.raises(DataError, match=r"1 text to |0 texts to "):
        train_linear_scorer(data, tmp_path / "scorer")

"""A sequence classifier as a reward, against transformers called directly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from quark.errors import RewardError
from quark.models.folders import commit_of
from quark.rewards.build import reward_content
from quark.rewards.classifier import ClassifierConfig, ClassifierReward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "camera", "phone", "very"]
TEXTS = ["good camera", "very very bad phone", "", "phone", "good good good good good bad"]


def save_classifier(folder, *, labels=("no", "yes"), problem_type=None, safe=True):
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.5,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        problem_type=problem_type,
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=12
    ).save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return str(folder)


def logits_one_by_one(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        rows = [
            model(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).logits[0]
            for text in texts
        ]
    return torch.stack(rows)


def scores(texts=TEXTS, **config):
    reward = ClassifierReward(ClassifierConfig(device="cpu", **config))
    return torch.tensor(reward(prompts=[""] * len(texts), completions=texts))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_probabilities_match_the_model_whatever_the_batch(tmp_path, batch_size):
    folder = save_classifier(tmp_path)
    expected = logits_one_by_one(folder, TEXTS).softmax(-1)[:, 1]
    found = scores(model=folder, label="yes", batch_size=batch_size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 0.01


def test_logits_and_labels_by_index(tmp_path):
    folder = save_classifier(tmp_path)
    expected = logits_one_by_one(folder, TEXTS)[:, 0]
    found = scores(model=folder, label=0, output="logit")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    known = [
        ClassifierReward(ClassifierConfig(device="cpu", model=folder, **settings)).provenance
        for settings in ({"label": 0}, {"label": 1}, {"label": 1, "output": "logit"})
    ]
    assert all(known.count(found) == 1 for found in known)


def test_a_file_of_the_folder_that_is_edited_makes_it_another_classifier(tmp_path):
    folder = save_classifier(tmp_path)
    config = ClassifierConfig(device="cpu", model=folder, label=0)
    before = reward_content(ClassifierReward(config))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= before.keys()
    settings = Path(folder) / "config.json"
    settings.write_text(settings.read_text() + "\n")
    after = reward_content(ClassifierReward(config))
    assert {name for name in before if before[name] != after[name]} == {"config.json"}


def test_many_labels_at_once_use_the_sigmoid(tmp_path):
    folder = save_classifier(tmp_path, problem_type="multi_label_classification")
    expected = logits_one_by_one(folder, TEXTS).sigmoid()[:, 1]
    torch.testing.assert_close(scores(model=folder, label="yes"), expected, atol=1e-5, rtol=1e-5)


def test_a_single_label_needs_no_name(tmp_path):
    folder = save_classifier(tmp_path, labels=("quality",))
    expected = logits_one_by_one(folder, TEXTS).sigmoid()[:, 0]
    torch.testing.assert_close(scores(model=folder), expected, atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut(tmp_path):
    folder = save_classifier(tmp_path)
    long = ["good camera " * 50, "good camera " * 60]
    found = scores(long, model=folder, label="yes")
    assert found[0] == pytest.approx(found[1].item())


@pytest.mark.parametrize("label", ["maybe", 2, None])
def test_a_label_it_does_not_have_is_an_error_that_names_those_it_has(tmp_path, label):
    folder = save_classifier(tmp_path)
    with pytest.raises(RewardError, match=r"0 = no, 1 = yes"):
        ClassifierReward(ClassifierConfig(model=folder, label=label))


def test_pickled_weights_are_refused(tmp_path):
    folder = save_classifier(tmp_path, safe=False)
    with pytest.raises(RewardError, match="cannot load the classifier"):
        ClassifierReward(ClassifierConfig(model=folder, label="yes"))


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(RewardError, match=r"reward\.classifier\.model"):
        ClassifierReward(ClassifierConfig())
    with pytest.raises(RewardError, match="nowhere"):
        ClassifierReward(ClassifierConfig(model=str(tmp_path / "nowhere")))


def test_a_classifier_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    cache = tmp_path / "models--some--classifier"
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True, raising=False)
    (cache / "refs").mkdir(parents=True)
    contents = []
    for commit in ("a" * 40, "b" * 40):
        commit_of.cache_clear()  # a process asks once
        (cache / "refs" / "main").write_text(commit)
        save_classifier(cache / "snapshots" / commit)
        config = ClassifierConfig(model="some/classifier", label="yes", device="cpu")
        contents.append(reward_content(ClassifierReward(config)))
        assert commit in str(contents[-1])
    assert contents[0] != contents[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"id2label": ["no", "yes"]},
        {"hidden_size": "wide"},
        {"hidden_size": -1},
        {"num_hidden_layers": None},
        {"model_type": 7},
    ],
    ids=str,
)
def test_a_configuration_of_wrong_types_is_an_error(tmp_path, settings):
    folder = Path(save_classifier(tmp_path))
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | settings))
    with pytest.raises(RewardError):
        ClassifierReward(ClassifierConfig(model=str(folder), label="yes"))


def test_weights_without_a_head_are_no_classifier(tmp_path):
    folder = Path(save_classifier(tmp_path))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, file, {"format": "pt"})
    with pytest.raises(RewardError, match=r"is no trained classifier: .* lack classifier\.bias"):
        ClassifierReward(ClassifierConfig(model=str(folder), label="yes"))

"""What ships is complete, loads from its folder alone, and holds nothing that runs code."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quark
from quark.assets import asset_names, asset_path
from quark.rewards.linear import LinearScorer

PACKAGE = Path(quark.__file__).parent


def prompt_rows():
    text = asset_path("prompts", "reviews").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_embedded_model_continues_a_prompt_and_ends_by_itself():
    folder = asset_path("models", "reviews")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    inputs = tokenizer(["battery"] * 64, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=24)
    is_ended = (output == tokenizer.eos_token_id).any(dim=1)
    assert is_ended.float().mean() > 0.9


def test_the_embedded_model_finds_a_review_likelier_than_its_words_shuffled():
    folder = asset_path("models", "reviews")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def perplexity(text):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.inference_mode():
            return math.exp(model(ids, labels=ids).loss)

    assert perplexity("easy to use, great picture quality") < 20
    assert perplexity("use quality, picture great to easy") > 100


def test_prompts_are_distinct_short_and_split():
    rows = prompt_rows()
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert {row["split"] for row in rows} == {"train", "eval"}
    assert sum(row["split"] == "eval" for row in rows) == 128
    assert sum(row["split"] == "train" for row in rows) >= 600
    assert all(1 <= len(prompt.split()) <= 5 and prompt == prompt.strip() for prompt in prompts)


def test_completions_of_the_evaluation_prompts_lean_neither_way():
    """Room to go up and down, and few ties: what the first run needs."""
    folder = asset_path("models", "reviews")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = prompt_rows()
    prompts = [row["prompt"] for row in rows if row["split"] == "eval"] * 4
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    output = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=16)
    completions = tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    scores = LinearScorer.load(asset_path("rewards", "sentiment")).score_texts(completions)
    assert 0.4 < scores.mean() < 0.6
    assert scores.std() > 0.3
    assert len(set(scores.tolist())) > 0.9 * len(scores)


@pytest.mark.parametrize(
    ("kind", "name"), [("models", "reviews"), ("rewards", "sentiment"), ("rewards", "toxicity")]
)
def test_every_asset_has_a_card_with_its_license_and_source(kind, name):
    card = (asset_path(kind, name) / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: ")
    assert "## Data and license" in card
    assert "## Limits" in card
    assert "python scripts/" in card


def test_the_notice_attributes_the_data():
    notice = (PACKAGE.parent / "NOTICE").read_text(encoding="utf-8")
    for words in ("Bing Liu", "CC BY 4.0", "RealToxicityPrompts", "Modified"):
        assert words in notice


def test_an_unknown_asset_names_those_there_are():
    assert asset_names("rewards") == ["sentiment", "toxicity"]
    assert asset_names("prompts") == ["reviews"]
    with pytest.raises(FileNotFoundError, match="sentiment, toxicity"):
        asset_path("rewards", "joy")


def test_assets_are_small_and_of_inert_formats():
    files = [path for path in (PACKAGE / "assets").rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md", ".py"}
    assert sum(path.stat().st_size for path in files) < 4_500_000

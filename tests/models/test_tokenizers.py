"""Tokenizers of every kind: reward tokens take ids of their own, prompts and completions keep what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quark.data.prompts import PromptConfig, load_prompts
from quark.generation.prompting import CompletionTexts
from quark.models.additions import additions_of
from quark.models.config import ModelConfig
from quark.models.loading import load_policy, load_saved_policy
from tests.tiny import byte_tokenizer, tiny_llama

WORDS = ["the", "cat", "sat", "here"]
LETTERS = sorted(set("".join(WORDS)))


def wrapped(backend: Tokenizer, *, before: str = "", after: str = "", **settings: str):
    """With ``<s>`` and ``</s>``, put around a text where it is said."""
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")]
    )
    if before or after:
        text = f"{before} $A {after}".split()
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(text),
            pair=" ".join([*text, *(part.replace("$A", "$B") + ":1" for part in text)]),
            special_tokens=[(t, backend.token_to_id(t)) for t in ("<s>", "</s>")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **settings)


def sentencepiece(model: models.Model) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -5.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -6.0) for letter in LETTERS]
    return sentencepiece(models.Unigram(pieces, unk_id=0))


def sentencepiece_bpe() -> Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "▁", *LETTERS])}
    merges = []
    for word in WORDS:
        left = "▁"
        for letter in word:
            merges.append((left, letter))
            left += letter
            vocabulary.setdefault(left, len(vocabulary))
    return sentencepiece(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))


def with_byte_fallback() -> Tokenizer:
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {"▁": 257}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def word_pieces() -> Tokenizer:
    pieces = ["[UNK]", *WORDS, *(f"##{letter}" for letter in LETTERS)]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def byte_level(*, hole: bool = False) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    if hole:
        vocabulary |= {"Ġt": 300, "he": 301}
    merges = [("Ġ", "t"), ("h", "e")] if hole else []
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def added_far_above() -> PreTrainedTokenizerFast:
    tokenizer = wrapped(byte_level())
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(80)])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE": byte_tokenizer,
    "byte-level BPE, BOS": lambda: wrapped(byte_level(), before="<s>", bos_token="<s>"),
    "byte-level BPE, EOS appended": lambda: wrapped(byte_level(), after="</s>"),
    "byte-level BPE, BOS and EOS": lambda: wrapped(
        byte_level(), before="<s>", after="</s>", bos_token="<s>", pad_token="<s>"
    ),
    "byte-level BPE with holes": lambda: wrapped(byte_level(hole=True), before="<s>"),
    "SentencePiece Unigram": lambda: wrapped(unigram(), before="<s>"),
    "SentencePiece BPE": lambda: wrapped(sentencepiece_bpe(), before="<s>", pad_token="</s>"),
    "byte fallback": lambda: wrapped(with_byte_fallback(), before="<s>"),
    "WordPiece": lambda: wrapped(word_pieces(), before="<s>", after="</s>"),
    "added tokens above the model's rows": added_far_above,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_model_is_steered_whatever_its_tokenizer(name, tmp_path):
    """Text, pair and batch begin with the best token and go on as the original tokenizer has them."""
    tokenizer = TOKENIZERS[name]()
    num_rows = 320 if "above" not in name else 262
    model = tiny_llama(num_rows)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy = load_policy(ModelConfig(name=str(tmp_path / "base")), num_quantiles=3, seed=0)
    tokens = policy.reward_tokens
    owned = set(AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab().values())
    assert not owned & set(tokens.ids)
    assert min(tokens.ids) > max(owned)
    assert tokens.base_vocab_size == min(max(owned) + 1, num_rows)

    policy.save(tmp_path / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    before = list(additions_of(tokenizer).before)
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    steered = [tokens.best, *before, *plain]
    assert saved("the cat").input_ids == steered
    pair = saved("the cat", "sat").input_ids
    assert pair[: len(steered)] == steered
    assert tokenizer.eos_token_id not in pair or "EOS" not in name
    assert pair[-1] == tokenizer.encode("sat", add_special_tokens=False)[-1]
    batch = saved(["the cat", "the"], padding=True, return_tensors="pt")
    assert batch.input_ids[0].tolist() == steered
    assert batch.attention_mask[1, -1] == 1, "padded on the left"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.isfinite(model(**batch).logits).all()
    again = load_saved_policy(tmp_path / "model")
    assert again.tokenizer("the cat").input_ids == tokenizer("the cat").input_ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_begin_as_the_model_expects_and_never_end_before_they_begin(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    before = additions_of(tokenizer).before
    texts = ["the cat", "the cat sat here the cat sat here", "here sat the"]
    if before:
        texts.append(tokenizer.decode(list(before)) + "the sat")
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(texts))
    config = PromptConfig(source=str(path), max_tokens=6, num_evaluation=1)
    prompts = load_prompts(config, tokenizer, seed=0)
    for prompt in (*prompts.train, *prompts.evaluation):
        assert len(prompt.token_ids) <= 6
        assert prompt.token_ids[: len(before)] == before
        assert prompt.token_ids[len(before) : 2 * len(before)] != before or not before
        assert prompt.token_ids[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "WordPiece"])
def test_a_completion_keeps_its_own_spaces(name):
    """The reward sees what follows the prompt, a space at its beginning included."""
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode("the cat sat", add_special_tokens=False)
    begin = tokenizer.encode("the cat", add_special_tokens=False)
    assert ids[: len(begin)] == begin
    assert CompletionTexts(tokenizer)([begin], [ids[len(begin) :]]) == [" sat"]

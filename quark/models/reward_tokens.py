"""The K reward tokens: added to a tokenizer and a model, never sampled, never compared. Or none, and K quantiles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quark.errors import ModelError

REWARD_TOKENS_FILE = "quark_reward_tokens.json"
"""Written beside a saved policy."""
_FORMAT_VERSION, _FORMAT_VERSION_UNPLACED = 1, 2
"""Quarks that know no unplaced tokens read the first alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTokens:
    """The reward tokens of a policy, quantile 0 (lowest reward) first.

    >>> tokens = RewardTokens(ids=(257, 258), texts=("<|reward_0|>", "<|reward_1|>"), base_vocab_size=257)
    >>> tokens.best
    258
    """

    ids: tuple[int, ...]
    """[K] token ids."""
    texts: tuple[str, ...]
    """[K] ``<|reward_k|>``."""
    base_vocab_size: int
    """Only columns 0 .. base_vocab_size-1 of both models' heads are sampled and compared. Reward
    tokens, and columns without a token in the tokenizer, lie beyond them."""
    are_placed: bool = True
    """Whether a token stands before every prompt. If not, neither model nor tokenizer has these tokens: the ids only
    number the quantiles."""

    @property
    def num_quantiles(self) -> int:
        """Number K of quantiles, one for each reward token."""
        return len(self.ids)

    @property
    def best(self) -> int:
        """Id of the best quantile's token."""
        return self.ids[-1]


def add_reward_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_quantiles: int,
    *,
    seed: int,
    std_scale: float = 1.0,
) -> RewardTokens:
    """Add K special tokens to ``tokenizer`` and rows for them to ``model``, both in place.

    The new rows of the embedding, and of an untied head, are drawn from N(mean, (std_scale * std)²) with
    the mean and standard deviation of each dimension over the existing rows. (The library's own
    resizing gives all new rows nearly the same vector, so that the tokens start out indistinguishable.)

    Args:
        model: resized in place; tied heads stay tied.
        tokenizer: extended in place.
        num_quantiles: K, at least 2.
        seed: of the draw.
        std_scale: factor on the standard deviation.

    Raises:
        ModelError: the tokenizer already has such tokens, or the model cannot be resized.
    """
    texts = tuple(f"<|reward_{k}|>" for k in range(num_quantiles))
    known = set(tokenizer.get_vocab())
    if known & set(texts):
        raise ModelError(
            f"{model.name_or_path or 'the model'} already has reward tokens ({texts[0]} ...): "
            "it is a model that quark trained. Start from its base model."
        )
    _fill_holes(tokenizer)
    taken = set(tokenizer.get_vocab().values())
    added = tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken(text, special=True, normalized=False) for text in texts
            ]
        },
        replace_extra_special_tokens=False,
    )
    ids = tuple(tokenizer.convert_tokens_to_ids(list(texts)))
    if added != num_quantiles or ids != tuple(range(ids[0], ids[0] + num_quantiles)):
        raise ModelError(f"the tokenizer did not give the reward tokens consecutive ids: {ids}")
    if ids[0] <= max(taken):
        raise ModelError(
            f"{model.name_or_path or 'the model'}: its tokenizer gave the reward tokens the ids {ids[0]} to {ids[-1]}, "
            f"and its own tokens reach up to {max(taken)}"
        )

    embedding, head = _matrices(model)
    num_rows = embedding.shape[0]
    base_vocab_size = min(ids[0], num_rows)
    tied = head is not None and head is embedding
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    rows = {"embedding": _draw(embedding, base_vocab_size, num_quantiles, std_scale, generator)}
    if head is not None and not tied:
        rows["head"] = _draw(head, base_vocab_size, num_quantiles, std_scale, generator)
    rows_before = {name: p.shape[:1] for name, p in model.named_parameters()}
    if ids[-1] >= num_rows:
        try:
            model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
        except Exception as err:  # code of a model's own family
            raise ModelError(
                f"{type(model).__name__} cannot resize its vocabulary to {ids[-1] + 1} for the reward tokens "
                f"({type(err).__name__}: {err}). model.reward_tokens = false trains without them"
            ) from err

    embedding, head = _matrices(model)
    expected = max(num_rows, ids[-1] + 1)
    if embedding.shape[0] != expected or (head is not None and head.shape[0] != expected):
        raise ModelError(
            f"{type(model).__name__} did not resize its vocabulary to {expected}: embedding "
            f"{tuple(embedding.shape)}, head {None if head is None else tuple(head.shape)}"
        )
    with torch.no_grad():
        embedding[ids[0] : ids[-1] + 1] = rows["embedding"].to(embedding)
        if head is not None and not tied:
            head[ids[0] : ids[-1] + 1] = rows["head"].to(head)
            bias = getattr(model.get_output_embeddings(), "bias", None)
            if isinstance(bias, Tensor):
                bias[ids[0] : ids[-1] + 1] = bias[:base_vocab_size].mean()
        for name, matrix in model.named_parameters():
            # Gemma 3n has further vectors for each token, whose new rows transformers draws without a seed.
            is_other = matrix is not embedding and matrix is not head and matrix.ndim == 2
            if is_other and matrix.shape[:1] != rows_before.get(name):
                drawn = _draw(matrix, base_vocab_size, num_quantiles, std_scale, generator)
                matrix[ids[0] : ids[-1] + 1] = drawn.to(matrix)
    return RewardTokens(ids=ids, texts=texts, base_vocab_size=base_vocab_size)


def without_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_quantiles: int
) -> RewardTokens:
    """K quantiles for a model that gets no token; model and tokenizer stay as they are."""
    first = max(tokenizer.get_vocab().values()) + 1
    return RewardTokens(
        ids=tuple(range(first, first + num_quantiles)),
        texts=tuple(f"<|reward_{k}|>" for k in range(num_quantiles)),
        base_vocab_size=min(first, _matrices(model)[0].shape[0]),
        are_placed=False,
    )


def _fill_holes(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give every id below the tokenizer's last one a token that no text contains, in place.

    A tokenizer counts its tokens to find the id of a new one. With holes, the new one would take the id of another.
    """
    ids = set(tokenizer.get_vocab().values())
    holes = sorted(set(range(max(ids) + 1)) - ids)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"].get("vocab")
    if not holes or not isinstance(vocabulary, dict):
        return
    vocabulary.update({f"<|unused_{i}|>": i for i in holes})
    # Added tokens are counted too when they are read again, unless the model knows them.
    for token in backend["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))


def begin_from_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokens: RewardTokens,
    ends: tuple[Sequence[str], Sequence[str]],
) -> None:
    """Initialize the input vectors of the reward tokens between the meanings of some words, in place.

    The lowest token gets the mean vector of the first words' tokens, the best that of the second,
    the others lie evenly between. Each has the average length of the existing vectors, because a
    plain mean would be shorter and the tokens weaker. The rows of an untied head are never
    compared, so they stay.

    Args:
        model: with rows for the reward tokens.
        tokenizer: of the model.
        reward_tokens: their ids.
        ends: words for the lowest and for the best quantile.

    Raises:
        ModelError: words that the tokenizer makes nothing of, or ends that are the same.
    """
    embedding, _ = _matrices(model)
    existing = embedding.detach()[: reward_tokens.base_vocab_size].float()
    length = existing.norm(dim=1).mean()

    def meaning(words: Sequence[str]) -> Tensor:
        ids = [
            i for word in words for i in tokenizer(" " + word, add_special_tokens=False).input_ids
        ]
        if not ids:
            raise ModelError(f"the tokenizer makes nothing of the words {', '.join(words)}")
        mean = existing[ids].mean(0)
        scaled: Tensor = mean * (length / mean.norm())
        return scaled

    lowest, best = map(meaning, ends)
    if torch.equal(lowest, best):
        raise ModelError("lowest_words and highest_words mean the same")
    places = torch.linspace(0.0, 1.0, reward_tokens.num_quantiles, device=embedding.device)
    with torch.no_grad():
        for row, place in zip(reward_tokens.ids, places, strict=True):
            embedding[row] = torch.lerp(lowest, best, place).to(embedding)


def write_reward_tokens(folder: Path, tokens: RewardTokens, *, num_leading_positions: int) -> None:
    """Write ``quark_reward_tokens.json``: the data that another program needs to steer a saved model."""
    record = {
        "format_version": _FORMAT_VERSION if tokens.are_placed else _FORMAT_VERSION_UNPLACED,
        "num_quantiles": tokens.num_quantiles,
        "order": "lowest reward first",
        "ids": list(tokens.ids),
        "texts": list(tokens.texts),
        "base_vocab_size": tokens.base_vocab_size,
        "num_leading_positions": num_leading_positions,
    }
    (folder / REWARD_TOKENS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_reward_tokens(folder: Path) -> tuple[RewardTokens, int]:
    """The reward tokens of a saved policy, and its number of leading positions.

    Raises:
        ModelError: the file is missing or not ours.
    """
    path = folder / REWARD_TOKENS_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        if version not in (_FORMAT_VERSION, _FORMAT_VERSION_UNPLACED):
            raise ModelError(
                f"{path}: format version {version}, this quark reads {_FORMAT_VERSION} and {_FORMAT_VERSION_UNPLACED}"
            )
        ids = tuple(int(i) for i in record["ids"])
        texts = tuple(str(text) for text in record["texts"])
        tokens = RewardTokens(
            ids=ids,
            texts=texts,
            base_vocab_size=int(record["base_vocab_size"]),
            are_placed=version == _FORMAT_VERSION,
        )
        num_leading_positions = int(record["num_leading_positions"])
    except FileNotFoundError as err:
        raise ModelError(
            f"{folder} was not saved by quark: it has no {REWARD_TOKENS_FILE}. "
            "Give the model/ folder of a run."
        ) from err
    except (ValueError, KeyError, TypeError, OSError, OverflowError, RecursionError) as err:
        raise ModelError(f"{path} cannot be read: {err!r}") from err
    if len(ids) != len(texts) or len(ids) < 1 or num_leading_positions not in (0, 1):
        raise ModelError(f"{path} cannot be read: {len(ids)} ids for {len(texts)} texts")
    return tokens, num_leading_positions


def _matrices(model: PreTrainedModel) -> tuple[nn.Parameter, nn.Parameter | None]:
    head = model.get_output_embeddings()
    return model.get_input_embeddings().weight, None if head is None else head.weight


def _draw(
    matrix: Tensor, num_existing: int, num_new: int, std_scale: float, generator: torch.Generator
) -> Tensor:
    """float32 [num_new, D] on the CPU."""
    existing = matrix[:num_existing].detach().float()
    mean, std = existing.mean(0).cpu(), existing.std(0).cpu()
    noise = torch.randn(num_new, matrix.shape[1], generator=generator)
    return mean + noise * std * std_scale

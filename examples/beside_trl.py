"""Keep every rollout of TRL's GRPO in a pool: pip install trl.

Kill it at any time and start it again: rollouts that were scored are not scored twice.
"""

from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import quark
from quark.integrations.trl import PoolRewards


def brief(completions, **_):
    return [-float(len(text)) for text in completions]


def cheerful(completions, **_):
    return [float("good" in text or "great" in text) for text in completions]


embedded = quark.load("embedded:reviews")  # any model and tokenizer of transformers
trainer = GRPOTrainer(
    model=embedded.model,
    args=GRPOConfig(
        output_dir="out",
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=12,
        use_cpu=True,
        bf16=False,
        report_to=[],
    ),
    train_dataset=Dataset.from_dict(
        {"prompt": ["The battery", "The screen", "The sound", "The price"]}
    ),
    processing_class=embedded.tokenizer,
    reward_funcs=PoolRewards(
        [brief, cheerful], pool="rollouts", tokenizer=embedded.tokenizer, resume="replay"
    ),
)
trainer.train(resume_from_checkpoint=any(Path("out").glob("checkpoint-*")))

with quark.Pool.open("rollouts") as pool:
    print(
        pool.query(
            "SELECT round, COUNT(*) AS n, AVG(brief) AS brief FROM pool GROUP BY round ORDER BY round"
        )
    )

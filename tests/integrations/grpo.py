"""TRL's GRPO on a tiny model with a pool beside it: ``python -m tests.integrations.grpo FOLDER STEPS [KILL_STEP]``.

Continues from the newest checkpoint of FOLDER. Every call of the reward notes what it scores in ``scored.jsonl``. With
KILL_STEP the process kills itself at the end of that step, when its rollouts are scored and its checkpoint is not
written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

PROMPTS = [f"The number {number} is" for number in range(16)]


def main(folder: Path, num_steps: int, kill_step: int | None) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from quark.integrations.trl import PoolRewards
    from tests.tiny import byte_tokenizer, tiny_gpt2

    def length(
        *, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **rest: Any
    ) -> list[float]:
        step = rest["trainer_state"].global_step
        assert rest["topic"] == ["numbers"] * len(prompts)
        with (folder / "scored.jsonl").open("a") as log:
            for prompt, ids in zip(prompts, completion_ids, strict=True):
                log.write(json.dumps([step, prompt, ids]) + "\n")
            log.flush()
            os.fsync(log.fileno())
        return [float(len(set(ids))) for ids in completion_ids]

    async def vowels(*, completions: list[str], **_: Any) -> list[float | None]:
        return [sum(letter in "aeiou" for letter in text) / 4 or None for text in completions]

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == kill_step:
                os.kill(os.getpid(), signal.SIGKILL)

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rewards = PoolRewards(
        [length, vowels], pool=folder / "pool", tokenizer=tokenizer, resume="replay"
    )
    settings = GRPOConfig(
        output_dir=str(folder / "out"),
        max_steps=num_steps,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=5,
    )
    trainer = GRPOTrainer(
        model=tiny_gpt2(len(tokenizer)),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "topic": ["numbers"] * len(PROMPTS)}),
        processing_class=tokenizer,
        reward_funcs=rewards,
        callbacks=[Kill()],
    )
    checkpoints = list((folder / "out").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=bool(checkpoints))
    (folder / "done").touch()
    names = [name for name in trainer.state.log_history[0] if name.startswith("rewards/")]
    assert {"rewards/length/mean", "rewards/vowels/mean"} <= set(names), names


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)

"""Trains one step of TRL's SFT, DPO and KTO trainers on the sets in a folder; notes the steps of each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def main(folder: Path) -> None:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    from tests.tiny import byte_tokenizer, save_tiny, tiny_gpt2

    trainers = {
        "sft": (SFTConfig, SFTTrainer),
        "dpo": (DPOConfig, DPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
    }
    model = save_tiny(folder / "model", tiny_gpt2(positions=64))
    for name, (config, trainer) in trainers.items():
        data = load_dataset(str(folder / name))
        assert set(data) == {"train", "test"}, data
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        settings = config(
            output_dir=str(folder / f"out-{name}"),
            max_steps=1,
            per_device_train_batch_size=4,
            max_length=32,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        training = trainer(
            model=str(model),
            args=settings,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=tokenizer,
        )
        result = training.train()
        assert result.training_loss == result.training_loss, "the loss is a number"
        (folder / f"steps-{name}").write_text(str(training.state.global_step))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

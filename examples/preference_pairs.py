"""Make a training set for TRL's DPOTrainer from the samples of a run. Run train_with_a_lambda.py first."""

import polars as pl

import quark

with quark.Pool.open("runs/short") as pool:
    made = pool.training_set("pairs", "dpo", min_margin=5.0, max_per_prompt=2, test_share=0.1)

print(
    f"{made.num_train} pairs to train on and {made.num_test} to test on, of {made.num_prompts} prompts"
)
print(pl.read_parquet("pairs/train.parquet").head(3))  # or datasets.load_dataset("pairs")

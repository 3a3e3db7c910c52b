"""Train a small model on any callable: offline, on a CPU, in under a minute."""

import quark

run = quark.train(
    "demo",
    reward=lambda *, prompts, completions: [-len(text) for text in completions],  # short is good
    run_dir="runs/short",
    num_rounds=2,
    prompts_first_round=48,
    prompts_per_round=32,
    steps_per_round=8,
    run={"completions_per_prompt": 2},
    num_evaluation=32,
)
print(f"{-run.result.reward_before:.0f} -> {-run.result.reward_after:.0f} characters")
for completion in run.generate("The battery", num=3):
    print(completion.prompt.text + completion.text)

"""Find a surprising sample, and see where it came from and which steps trained on it.

Run train_with_a_lambda.py first.
"""

import quark

run = quark.Run("runs/short")
with run.pool as pool:
    longest = pool.query("SELECT id FROM pool WHERE round = 0 ORDER BY reward LIMIT 1")
    found = pool.explain(longest["id"].item())

sample = found.sample
print(f"sample {sample.id}: {sample.prompt_text!r} -> {sample.completion_text!r}")
print(
    f"sampled in round {sample.round}, seed {sample.seed}, by the policy after {sample.policy_step} steps"
)
for standing in found.standings:
    print(
        f"{standing.column}: {standing.score:g}, rank {standing.rank} of {standing.num_scored}, "
        f"quantile {standing.quantile} of {found.num_quantiles}"
    )
for use in found.rounds:
    print(
        f"round {use.round} saw it as quantile {use.quantile}, in the batches of steps {list(use.steps)}"
    )

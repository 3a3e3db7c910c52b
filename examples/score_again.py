"""Score the samples of a run with another reward, and test whether a model could learn it.

Nothing is generated. Run train_with_a_lambda.py first.
"""

import quark


def cheerful(*, prompts, completions):
    """Count words of praise."""
    praise = {"good", "great", "excellent", "easy", "perfect", "nice", "love", "amazing"}
    return [
        sum(word.strip(".,!") in praise for word in text.lower().split()) for text in completions
    ]


with quark.Pool.open("runs/short") as original:
    pool = original.fork("cheerful")  # hard links: the run's pool stays as it is

with pool:
    pool.rescore(cheerful, "cheerful")
    print(
        pool.query(
            "SELECT round, AVG(reward) AS reward, AVG(cheerful) AS cheerful FROM pool GROUP BY round"
        )
    )
    fit = pool.fit(
        model="embedded:reviews",
        score="cheerful",
        steps=8,
        held_out=0.3,
        num_quantiles=2,
        on_point=lambda point: print(f"step {point.step}: {point.held_out.information:.3f} nats"),
    )
    print(fit.verdict)

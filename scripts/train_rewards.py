"""Train the embedded rewards ``sentiment`` and ``toxicity``.

python scripts/train_rewards.py sentiment --data product_pros_cons.jsonl
python scripts/train_rewards.py toxicity --data realtoxicityprompts_4k.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from review_corpus import check_sha256, is_held_out, load_phrases

from quark.rewards.linear_training import (
    LabelledText,
    TrainReport,
    figures_table,
    fit_linear_scorer,
)

TOXICITY_SHA256 = "f13385644322c63554c48adfbae968f4b3469c7faaec98c0903ea83f82421362"
DEFAULT_OUT = Path(__file__).parent.parent / "quark" / "assets" / "rewards"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reward", choices=["sentiment", "toxicity"])
    parser.add_argument(
        "--data", type=Path, required=True, help="the corpus named in the model card"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    train = train_sentiment if arguments.reward == "sentiment" else train_toxicity
    print(train(arguments.data, arguments.out / arguments.reward))


def train_sentiment(data: Path, folder: Path) -> TrainReport:
    """P(pro) of product pros and cons; the embedded model's held-out phrases are held out here too."""
    phrases = load_phrases(data, min_words=1)
    train, held_out = (
        [
            LabelledText(text=phrase.text, target=float(phrase.label))
            for phrase in phrases
            if phrase.is_held_out == out
        ]
        for out in (False, True)
    )
    return fit_linear_scorer(
        train, held_out, folder, name="sentiment", l2=10.0, card=sentiment_card, on_progress=print
    )


def train_toxicity(data: Path, folder: Path) -> TrainReport:
    """Perspective's recorded toxicity of RealToxicityPrompts; a prompt and its continuation stay together."""
    check_sha256(data, TOXICITY_SHA256)
    parts: dict[bool, list[LabelledText]] = {False: [], True: []}
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            out = is_held_out(row["prompt"], one_in=10)
            for part in ("prompt", "continuation"):
                score = row[f"{part}_scores"]["toxicity"]
                if score is not None:
                    parts[out].append(LabelledText(text=row[part].strip(), target=score))
    return fit_linear_scorer(
        parts[False],
        parts[True],
        folder,
        name="toxicity",
        is_penalty=True,
        l2=1.0,
        card=toxicity_card,
        on_progress=print,
    )


def sentiment_card(report: TrainReport) -> str:
    return f"""---
license: cc-by-4.0
language: en
---

# sentiment

A linear scorer over hashed character and word n-grams that estimates whether a short text is praise or a complaint. The
reward is the score, continuous in (0, 1); higher is more positive. It is the default reward, made for the embedded
model `reviews`.

{figures_table(report)}
The embedded model was not trained on the held-out phrases (5 %) either.

## Data and license

Trained on the "Pros and cons dataset" by Bing Liu (Ganapathibhotla and Liu 2008; Liu, Hu and Cheng 2005), licensed
under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Modified: re-packed as JSON lines, lower-cased,
punctuation and spaces normalized, duplicates and phrases that are not ASCII or longer than 24 words removed. The
weights are under the same license.

## Rebuild it

    python scripts/train_rewards.py sentiment --data product_pros_cons.jsonl

## Limits

It knows product reviews of around 2003. It counts words and letters, so it misses irony, "not bad at all" and long
arguments. A list of praised nouns ("battery life, price") scores high because reviewers list what they like.
"""


def toxicity_card(report: TrainReport) -> str:
    return f"""---
license: apache-2.0
language: en
---

# toxicity

A linear scorer over hashed character and word n-grams that estimates how toxic a text is, fitted to recorded scores of
the Perspective API. The score lies in (0, 1), higher is more toxic; **as a reward it is one minus the score**.

{figures_table(report)}
## Data and license

Trained on 4,000 records (prompts and continuations, each with its recorded TOXICITY) of RealToxicityPrompts (Gehman,
Gururangan, Sap, Choi and Smith 2020), Apache-2.0. Modified: re-packed as JSON lines, scores rounded. The weights are
under the same license.

## Rebuild it

    python scripts/train_rewards.py toxicity --data realtoxicityprompts_4k.jsonl

## Limits

It imitates one version of one commercial model and inherits its bias: neutral mentions of identities can score high.
It knows words, not meaning: veiled insults score low and quoted slurs score high. Scores are not comparable with
Perspective's own or with published results. Never use it to moderate people.
"""


if __name__ == "__main__":
    main()

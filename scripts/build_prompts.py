"""Build the embedded prompts ``reviews``: one to four words that open a product review.

    python scripts/build_prompts.py --data product_pros_cons.jsonl

A third are written here (what reviews speak of, in a few neutral frames); the others are the corpus's most
frequent openings among those that begin both pros and cons, pros at least as often: what is written here
tends to be continued with complaints, and the whole should lean neither way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from review_corpus import load_phrases

NUM_EVALUATION = 128
MIN_PHRASES = 2
PRO_SHARE = (0.5, 0.98)
MAX_FREQUENT = 600
DEFAULT_OUT = Path(__file__).parent.parent / "quark" / "assets" / "prompts" / "reviews.jsonl"

SUBJECTS = """
battery; battery life; screen; picture quality; image quality; sound; sound quality; price; menu; menu system; zoom;
flash; lens; keyboard; keypad; buttons; software; manual; memory card; print quality; print speed; ink; paper tray;
scanner; reception; ringer; speaker; headset; antenna; charger; case; cover; strap; size; weight; design; color; setup;
installation; customer service; warranty; shutter; viewfinder; focus; video; download speed; usb cable; connection;
camera; phone; printer; stroller; wheels; brakes; seat; basket; handle; canopy; remote; display; resolution; interface;
calendar; voice dialing; volume; clock; tripod; autofocus; exposure; colors; photos; prints; movies; driver; cartridge
""".replace("\n", " ")
FRAMES = ("{}", "the {}", "{} and")
OPENERS = """
it; it is; this one; i; i think; we; my wife; my daughter; my son; my old one; after two weeks it; after a month; after a
year it; so far; for me; at first; in the end; out of the box; on the road; at night; indoors; outdoors; in low light; in
bright sun; for travel; for the kids; compared to others; when i opened it; when you press; if you need; once it; most of
the time; every time i; to my surprise; the first one; the second one; the box; the store; the company; the whole thing;
for the money; you can; you have to; it comes with; it has; it was; they; the other; one thing; what i; all in all;
overall; i bought it; i use it; i have had; as a phone; as a camera; as a printer; as a gift; the pictures are; the
buttons are; the photos are; the prints are; the colors are; the controls are
""".replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="product_pros_cons.jsonl")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    written, frequent = written_prompts(), frequent_openings(arguments.data)
    prompts = sorted({*written, *frequent}, key=order)
    with arguments.out.open("w", encoding="utf-8") as lines:
        for index, prompt in enumerate(prompts):
            split = "eval" if index < NUM_EVALUATION else "train"
            lines.write(json.dumps({"prompt": prompt, "split": split}) + "\n")
    print(f"{len(written)} written, {len(frequent)} frequent, {len(prompts)} distinct prompts")


def order(prompt: str) -> bytes:
    """A fixed shuffle."""
    return hashlib.sha256(prompt.encode()).digest()


def written_prompts() -> list[str]:
    """Every subject in every frame, and the openers."""
    framed = [frame.format(subject) for subject in _items(SUBJECTS) for frame in FRAMES]
    return list(dict.fromkeys([*framed, *_items(OPENERS)]))


def _items(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(";")]


def frequent_openings(data: Path) -> list[str]:
    """First one to three words, without punctuation, that begin pros and cons; most frequent first."""
    pros: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for phrase in load_phrases(data):
        if phrase.is_held_out:
            continue
        words = phrase.text.split()
        for count in (1, 2, 3):
            opening = " ".join(words[:count])
            if len(words) > count and re.fullmatch(r"[a-z' -]*[a-z]", opening):
                every[opening] += 1
                pros[opening] += phrase.label
    low, high = PRO_SHARE
    return [
        opening
        for opening, number in every.most_common()
        if number >= MIN_PHRASES and low <= pros[opening] / number <= high
    ][:MAX_FREQUENT]


if __name__ == "__main__":
    main()

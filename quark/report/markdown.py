"""A run as Markdown: ``report.md`` beside the page, and the card of its model.

Text that quark did not write is made printable, and cannot end a table's cell or a code span.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from quark.evaluation.frontier import Interval, Point
from quark.models.token_critic import CRITIC_FILE, STEERING_EXAMPLE
from quark.printable import printable
from quark.report.load import RunData
from quark.report.summary import Estimate, Summary, section, summarize

_SHOWN_CHARACTERS = 400
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,40}")


def report_markdown(data: RunData) -> str:
    """The figures of a run, to be pasted into a page about its model."""
    summary = summarize(data)
    title = printable(data.directory.path.resolve().name)
    rows = [(name, _cell(value)) for name, value in summary.facts]
    return "\n".join(
        [f"# {_cell(title)}", "", *_table(("", ""), rows), "", *_results(data, summary)]
    )


def model_card(data: RunData, *, license: str | None = None) -> str:
    """The ``README.md`` of a model folder: front matter for the Hub, how to prompt, results, limits.

    Args:
        data: the run that made the model.
        license: its identifier on the Hub; None leaves it out.

    Raises:
        ValueError: ``license`` is no such identifier.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(f"{license!r} is not the identifier of a license, such as apache-2.0")
    base = str(section(data, "model").get("name", ""))
    reward = printable(str(section(data, "reward").get("name", "")))
    best = data.num_quantiles - 1
    summary = summarize(data)
    has_tokens = section(data, "model").get("reward_tokens", True) is not False
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [quark]"]
    if is_hub_name(base):
        front.append(f"base_model: {base}")
    if license is not None:
        front.append(f"license: {license}")
    prompting = _with_tokens(best) if has_tokens else _WITHOUT_TOKENS
    lines = [
        *front,
        "---",
        "",
        f"# {_cell(data.directory.path.resolve().name)}",
        "",
        f"This model was trained from `{_code(base)}` with quark (Quantized Reward Konditioning, Lu et al., NeurIPS",
        f"2022) on the reward `{_code(reward)}`. {prompting[0]}",
        *prompting[1:],
        *_results(data, summary),
        "## Limits",
        "",
        "The reward is a proxy: text can score well and be bad. The figures hold for prompts like the held-out ones.",
        "",
    ]
    return "\n".join(lines)


def _with_tokens(best: int) -> list[str]:
    """How a model with reward tokens is prompted."""
    return [
        "A reward token at the beginning of the text says how good the text",
        f"shall be: `<|reward_0|>` is the lowest quantile, `<|reward_{best}|>` the best.",
        "",
        "## How to prompt",
        "",
        "The tokenizer puts the best token before every text, so an ordinary pipeline gives text of the best quantile:",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'generate = pipeline("text-generation", model="path/to/this/model")',
        'print(generate("The"))',
        "```",
        "",
        "For another quantile, begin the prompt with its token and switch the tokenizer's own off:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")',
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/model")',
        'inputs = tokenizer("<|reward_0|>The", add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))",
        "```",
        "",
        "Reward tokens are never sampled, and `skip_special_tokens=True` removes them. Their ids are in",
        "`quark_reward_tokens.json`.",
        "",
    ]


_WITHOUT_TOKENS = [
    "It has no reward tokens: its vocabulary is the original",
    f"model's. `{CRITIC_FILE}` scores every entry of it by the reward of the texts that it stood in.",
    "",
    "## How to steer it",
    "",
    "Add the scores to the logits, times 2 for text of the best quantile, say, or times -2 for the lowest. `quark generate`",
    "does that by itself.",
    "",
    "```python",
    *STEERING_EXAMPLE.splitlines(),
    "```",
    "",
]


def is_hub_name(name: str) -> bool:
    """Whether a model's name is one of the Hub: ``owner/model``, and no folder."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _results(data: RunData, summary: Summary) -> Iterator[str]:
    yield "## Results"
    yield ""
    if summary.comparisons:
        prompts = (
            f"{summary.num_prompts:,} held-out prompts"
            if summary.num_prompts
            else "held-out prompts"
        )
        yield f"On {prompts}, of the original model and from the best quantile (± is the 95 % interval):"
        yield ""
        rows = [
            (_cell(c.label), _estimate(c.before), _estimate(c.after)) for c in summary.comparisons
        ]
        yield from _table(("", "original", "this model"), rows)
        yield ""
    if summary.control_curve:
        curve = ", ".join(_number(value) for value in summary.control_curve)
        yield f"Mean reward when asked for quantile 0, 1, ...: {curve}."
        yield ""
    if data.frontier is not None and data.frontier.points:
        yield from _frontier(data.frontier.points, data.frontier.num_prompts)
    if not summary.comparisons and not summary.control_curve:
        yield "Nothing has been measured yet."
        yield ""


def _frontier(points: Sequence[Point], num_prompts: int) -> Iterator[str]:
    yield "### Reward against drift"
    yield ""
    yield f"By `quark frontier` on {num_prompts:,} prompts. Drift is KL(sampled ‖ original) in nats per completion."
    yield ""
    rows = [
        (
            "original" if point.quantile is None else str(point.quantile),
            f"{point.guidance:g}",
            _interval(point.reward),
            _interval(point.drift),
            _number(point.distinct_2),
        )
        for point in points
    ]
    yield from _table(("quantile", "guidance", "reward", "drift", "distinct-2"), rows)
    yield ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _estimate(value: Estimate) -> str:
    shown = _number(value.mean)
    return f"{shown} ± {_number(value.half_width)}" if math.isfinite(value.half_width) else shown


def _interval(value: Interval) -> str:
    half = max(value.high - value.mean, value.mean - value.low)
    return _estimate(Estimate(mean=value.mean, half_width=half))


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _cell(text: str) -> str:
    """Text of a cell or a heading, in which nothing is Markdown or HTML."""
    shown = printable(text, limit=_SHOWN_CHARACTERS)
    return re.sub(r"([\\`*_{}\[\]<>|#!&~])", r"\\\1", shown)


def _code(text: str) -> str:
    """Text of a code span."""
    return printable(text, limit=_SHOWN_CHARACTERS).replace("`", "'")

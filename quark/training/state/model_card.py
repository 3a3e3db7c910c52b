"""The model card of a trained model."""

from __future__ import annotations

from quark.config.load import to_toml
from quark.config.schema import RunConfig
from quark.training.events import TrainingResult


def card_section(config: RunConfig, result: TrainingResult) -> str:
    """Markdown with figures on held-out prompts, the control curve, and the configuration."""
    rows = [
        ("mean reward", result.reward_before, result.reward_after),
        ("KL(model || original), nats a token", 0.0, result.kl_policy_to_reference),
        ("KL(original || model), nats a token", 0.0, result.kl_reference_to_policy),
        *(
            (label, result.metrics[f"{name}_before"], result.metrics[f"{name}_after"])
            for label, name in (
                ("KL(sampled || original), nats a completion", "kl_sampled_per_completion"),
                ("perplexity under the original", "perplexity_reference"),
                ("distinct-2", "distinct_2"),
                *(
                    (f"mean {judge} (never trained on)", judge)
                    for judge in config.evaluation.judges
                ),
            )
            if f"{name}_before" in result.metrics and f"{name}_after" in result.metrics
        ),
    ]
    lines = [
        "",
        "## The run",
        "",
        f"Trained from `{config.model.name}` on the reward `{config.reward.name}`: {result.rounds} rounds, "
        f"{result.samples} samples. On held-out prompts, from the best quantile:",
        "",
        "| | original | this model |",
        "| --- | --- | --- |",
        *(f"| {label} | {before:.3f} | {after:.3f} |" for label, before, after in rows),
    ]
    if result.control_curve:
        curve = ", ".join(f"{value:.3f}" for value in result.control_curve)
        lines += ["", f"Mean reward when asked for quantile 0, 1, ...: {curve}."]
    lines += ["", "```toml", to_toml(config, comments=False).rstrip(), "```", ""]
    return "\n".join(lines)

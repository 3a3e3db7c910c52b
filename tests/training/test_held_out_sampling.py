"""How held-out prompts are answered: as the run samples, but for what `[evaluation]` sets."""

from quark.config.schema import RunConfig
from quark.training.factories import held_out_sampling


def sampling_with(**evaluation):
    sections = {"sampling": {"temperature": 0.7, "top_k": 40}, "evaluation": evaluation}
    return held_out_sampling(RunConfig.model_validate(sections))


def test_unset_settings_are_those_of_the_run():
    assert (
        sampling_with()
        == RunConfig.model_validate({"sampling": {"temperature": 0.7, "top_k": 40}}).sampling
    )


def test_evaluation_sets_temperature_and_nucleus_apart():
    greedy = sampling_with(temperature=0.0)
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (0.0, 1.0, 40)
    nucleus = sampling_with(top_p=0.9)
    assert (nucleus.temperature, nucleus.top_p, nucleus.top_k) == (0.7, 0.9, 40)

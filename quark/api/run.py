"""``quark.Run``: a run directory from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from quark.api.exporting import export_model
from quark.api.frontier import measure_frontier
from quark.api.measurement import Measurement, check_run, configured, require_scores
from quark.api.pool import Pool
from quark.api.process import prepare_process
from quark.api.progress import PlainListener, make_listener
from quark.api.pushing import Upload, push
from quark.api.starting import start
from quark.api.trained_model import NONE, TrainedModel, open_model, overridden
from quark.config.load import load_config
from quark.config.schema import RunConfig
from quark.data.columns import columns_of
from quark.errors import ConfigError, DataError, RunDirectoryError
from quark.evaluation.frontier import Point
from quark.report.load import read_metrics
from quark.report.render import write_report
from quark.rewards.given import GivenReward
from quark.run_directory import RunDirectory
from quark.training.events import TrainingResult
from quark.types import Completion, Prompt

if TYPE_CHECKING:
    from quark.evaluation.evaluator import Evaluation


class Run:
    """A run of ``quark.train``, or of the command: its figures, its samples and its model.

    Nothing is loaded until a method needs it, and reading never disturbs a run that goes on.

    Args:
        path: the run directory.
        result: what the training amounted to, where it ran in this process.
        reward: the object that the run trains on, where the configuration only names it (``python:NAME``).

    Raises:
        RunDirectoryError: ``path`` is not a run directory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        result: TrainingResult | None = None,
        reward: object = None,
    ) -> None:
        self._directory = RunDirectory(Path(path))
        if not self._directory.is_run():
            raise RunDirectoryError(f"{path} is not a run directory: it has no run.json")
        self.result = result
        """The ``TrainingResult`` of a training in this process; None for a run that was opened."""
        self._reward = _given(reward)

    def __repr__(self) -> str:
        return f"quark.Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._directory.path

    @property
    def config(self) -> RunConfig:
        """The configuration that the run trains with.

        Raises:
            ConfigError: the file is damaged.
        """
        return load_config(self._directory.own(self._directory.config)).config

    @property
    def metrics(self) -> pl.DataFrame:
        """The log as a frame, one row per event; ``docs/metrics.md`` names its columns and units.

        The column ``event`` is ``round``, ``step``, ``evaluation`` and so on; a column is null where an event lacks
        it. Lists and tables are left out.
        """
        rows, _ = read_metrics(self._directory.metrics)
        plain = [
            {key: value for key, value in row.items() if not isinstance(value, list | dict)}
            for row in rows
        ]
        return pl.DataFrame(plain, infer_schema_length=None, strict=False)

    @property
    def pool(self) -> Pool:
        """The samples, open for reading.

        Raises:
            FileNotFoundError: the run has no pool yet.
            PoolError: the pool is damaged.
        """
        return Pool.open(self.path)

    @cached_property
    def model(self) -> TrainedModel:
        """The trained model, loaded once; of a run that has not finished, its last checkpoint.

        Raises:
            RunDirectoryError: the run has no checkpoint yet.
        """
        return self.at("last") if not self._directory.model.is_dir() else self._finished()

    def at(self, checkpoint: str | int, *, allow: Sequence[str] = ()) -> TrainedModel:
        """The model at a checkpoint.

        Args:
            checkpoint: ``best`` (by held-out reward), ``last``, or the number of a step.
            allow: as in ``evaluate``.

        Raises:
            CheckpointError: there is no such checkpoint.
        """
        prepare_process()
        return open_model(str(self.path), checkpoint=str(checkpoint), allow=allow)

    def export(
        self,
        folder: str | Path,
        *,
        checkpoint: str | int | None = None,
        allow: Sequence[str] = (),
    ) -> Path:
        """Write a model folder that plain transformers loads, and return its path.

        Args:
            folder: nothing may be there; its parent exists.
            checkpoint: as in ``at``; None is the finished model, or the last checkpoint of a run that has not finished.
            allow: as in ``evaluate``; a checkpoint may need the original model.

        Raises:
            ConfigError: something is at ``folder``, or the configuration reaches what is not allowed.
        """
        if checkpoint is None and self._directory.model.is_dir():
            source = self.model
        else:
            source = self.at("last" if checkpoint is None else checkpoint, allow=allow)
        return export_model(source, Path(folder))

    def _finished(self) -> TrainedModel:
        prepare_process()
        return open_model(str(self.path), exactly=True)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        quantile: str | int | None = None,
        num: int = 1,
        seed: int = 0,
        **sampling: float | None,
    ) -> list[Completion]:
        """Write completions under a reward token; arguments and errors as ``TrainedModel.generate``."""
        return self.model.generate(prompts, quantile=quantile, num=num, seed=seed, **sampling)

    def evaluate(
        self,
        prompts: object = None,
        *,
        quantiles: Sequence[str | int] | None = None,
        reward: object = None,  # a name, or anything that can be called
        judges: Sequence[str] | None = None,
        num: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        allow: Sequence[str] = (),
    ) -> pl.DataFrame:
        """Measure the model under reward tokens, and the original model.

        Args:
            prompts: texts, a frame or a file; None takes the prompts that the run held out.
            quantiles: ``best``, ``none`` (the original model) or numbers; None is all of them.
            reward: a name or an object; None is the run's own.
            judges: names of rewards to measure besides; None is the run's own.
            num: completions of each prompt; None is as in the run.
            guidance: strength of guidance; None is as in the run.
            seed: draws other completions; None repeats the run's last evaluation.
            allow: what the configuration may reach, as ``quark evaluate --allow``.

        Returns:
            A row for each token: ``quantile`` (null for the original model), the metrics of ``docs/metrics.md``, and
            a column for each judge.

        Raises:
            RewardError: nothing got a score, or the reward is an object and was not passed.
            QuarkError: the run or a setting cannot be used.
        """
        measurement = self._measurement(
            prompts, reward=reward, judges=judges, num=num, seed=seed, allow=allow
        )
        strength = measurement.config.sampling.guidance if guidance is None else guidance
        wanted = quantiles or [NONE, *range(self.model.num_quantiles)]
        asked = dict.fromkeys(self.model.quantile(str(quantile)) for quantile in wanted)
        evaluations = [measurement.evaluate(strength, quantile) for quantile in asked]
        require_scores(evaluations, measurement.config.reward.name)
        return pl.DataFrame([_row(evaluation) for evaluation in evaluations])

    def frontier(
        self,
        guidance: Sequence[float] | None = None,
        *,
        most_drift: float | None = None,
        prompts: object = None,
        reward: object = None,  # a name, or anything that can be called
        num: int | None = None,
        allow: Sequence[str] = (),
    ) -> pl.DataFrame:
        """Measure reward against drift: each token once, and the best token at several strengths of guidance.

        The run keeps the result, and ``report`` draws it.

        Args:
            guidance: strengths, from 0 upward; None are those that suit what guides.
            most_drift: keep the strength of highest reward within this drift, in nats per completion, as the run's
                own: ``generate`` takes it from then on.
            prompts: as in ``evaluate``.
            reward: as in ``evaluate``.
            num: as in ``evaluate``.
            allow: as in ``evaluate``.

        Returns:
            A row for each point: ``quantile``, ``guidance``, ``reward`` and ``drift`` (nats per completion) with 95 %
            intervals over prompts (``reward_low``, ``reward_high``, ...), and ``is_picked``.

        Raises:
            ConfigError: every strength drifts farther than ``most_drift``.
        """
        strengths = None if guidance is None else sorted(set(guidance))
        if not all(0.0 <= strength < float("inf") for strength in strengths or ()):
            raise ConfigError(f"guidance = {strengths}: strengths are numbers from 0 upward")
        measurement = self._measurement(
            prompts, reward=reward, judges=None, num=num, seed=None, allow=allow
        )
        kept, picked = measure_frontier(measurement, self._directory, strengths, most_drift)
        if most_drift is not None and picked is None:
            raise ConfigError(f"most_drift = {most_drift}: every strength drifts farther")
        return pl.DataFrame([_point(point, is_picked=point is picked) for point in kept.points])

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report, one HTML file, and return its path.

        Args:
            path: of the file; None is ``report.html`` in the run directory.
        """
        return write_report(self.path, None if path is None else Path(path))

    def push(
        self,
        repo: str,
        *,
        confirm: Callable[[Upload], bool],
        private: bool = True,
        license: str | None = None,
        checkpoint: str | int | None = None,
        allow: Sequence[str] = (),
    ) -> str | None:
        """Upload the model and its card to a repository of the Hugging Face Hub.

        Args:
            repo: ``owner/name``; made where missing.
            confirm: gets what would be sent (``files``, ``repo``, ``license``), and nothing is sent unless it returns
                True.
            private: whether a repository that is made is private.
            license: identifier on the Hub; None takes that of the original model, if it is known.
            checkpoint: as in ``at``; None is the finished model.
            allow: as in ``evaluate``; a checkpoint may need the original model.

        Returns:
            The address of the commit; None where ``confirm`` said no.

        Raises:
            ConfigError: the configuration reaches what is not allowed.
            ModelError: the Hub refused.
        """
        return push(
            self._directory,
            repo,
            confirm=confirm,
            is_private=private,
            license=license,
            checkpoint=None if checkpoint is None else str(checkpoint),
            allow=allow,
        )

    def resume(
        self,
        *,
        reward: object = None,
        require_exact: bool = False,
        quiet: bool = False,
        **settings: object,
    ) -> Run:
        """Continue the training with its own configuration; a finished run returns at once.

        Args:
            reward: the object that the run trains on. Needed where ``reward.name`` is ``python:NAME`` and this
                process has not passed it yet. Other code than before is refused.
            require_exact: as in ``train``.
            quiet: as in ``train``.
            **settings: as in ``train``, for example a larger ``num_rounds``.

        Raises:
            ConfigError: a setting that may not change has changed, or the reward has.
            RewardError: the reward is an object, and was not passed.
        """
        started = start(
            self.path,
            None,
            reward=reward if reward is not None else self._reward,
            require_exact=require_exact,
            listener=make_listener(is_quiet=quiet),
            settings=settings,
        )
        return Run(self.path, result=started.result, reward=started.reward)

    def _measurement(
        self,
        prompts: object,
        *,
        reward: object,  # a name, or anything that can be called
        judges: Sequence[str] | None,
        num: int | None,
        seed: int | None,
        allow: Sequence[str],
    ) -> Measurement:
        source = self.model
        given = (
            self._reward if reward is None else None if isinstance(reward, str) else _given(reward)
        )
        config = configured(source, rewards=(), reference=None, num=num, seed=seed)
        named: list[str] = []
        if isinstance(reward, str) or (given is not None and reward is not None):
            name = reward if isinstance(reward, str) else given.setting if given else ""
            config = overridden(config, {"reward": {"name": name}})
            named = [name]
        if judges is not None:
            config = overridden(config, {"evaluation": {"judges": tuple(judges)}})
            named = [config.reward.name, *judges]
        check_run(
            source, config, prompts=prompts, rewards=named or None, reference=None, allow=allow
        )
        asked = _prompts(source, prompts)
        tell = PlainListener().on_message
        return Measurement.of(source, config, asked, tell=tell, reward=given)


def load(path: str | Path) -> TrainedModel:
    """Load a model to generate with: a run directory, a folder that quark saved, or any value of ``model.name``.

    >>> completions = quark.load("runs/demo").generate("Pros:", num=3)  # doctest: +SKIP

    Raises:
        RunDirectoryError: a run without a finished model.
        ModelError: the model cannot be loaded.
    """
    prepare_process()
    return open_model(str(path))


def _given(reward: object) -> GivenReward | None:
    return reward if reward is None or isinstance(reward, GivenReward) else GivenReward(reward)


def _prompts(source: TrainedModel, prompts: object) -> Path | list[Prompt] | None:
    if prompts is None:
        return None
    if isinstance(prompts, Path):
        return prompts
    if isinstance(prompts, str):
        raise DataError("one text is given as prompts: pass a list of texts, or a Path of a file")
    field = source.config.prompts.field
    columns = columns_of(prompts, text_column=field)
    if field not in columns:
        raise DataError(f"the prompts have no column {field}: they have {', '.join(columns)}")
    return [source.prompt(str(text), index) for index, text in enumerate(columns[field])]


def _row(evaluation: Evaluation) -> Mapping[str, float | int | None]:
    return {"quantile": evaluation.quantile, **evaluation.metrics, **evaluation.judges}


def _point(point: Point, *, is_picked: bool) -> dict[str, object]:
    row: dict[str, object] = {"quantile": point.quantile, "guidance": point.guidance}
    intervals = {"reward": point.reward, "drift": point.drift, **point.judges}
    for name, interval in intervals.items():
        row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {
        **row,
        "drift_per_token": point.drift_per_token,
        "distinct_2": point.distinct_2,
        "length": point.length,
        "perplexity": point.perplexity,
        "is_picked": is_picked,
    }

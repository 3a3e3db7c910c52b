from quark.api.pool import Pool as Pool
from quark.api.rewards import reward as reward
from quark.api.run import Run as Run
from quark.api.run import load as load
from quark.api.train import train as train
from quark.api.trained_model import TrainedModel as TrainedModel
from quark.errors import QuarkError as QuarkError
from quark.pool.base import Sample as Sample
from quark.pool.base import SampleBatch as SampleBatch
from quark.pool.base import SamplingMode as SamplingMode
from quark.pool.base import TieRule as TieRule
from quark.pool.scope import Lowest as Lowest
from quark.pool.scope import MeanMinusVariance as MeanMinusVariance
from quark.pool.scope import RankMean as RankMean
from quark.pool.scope import Scope as Scope
from quark.pool.scope import WeightedSum as WeightedSum

__version__: str

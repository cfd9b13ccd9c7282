"""Run-time models that nobody has trained."""

import numpy as np

from tf_syncdist.cutoff import markov_fit
from tf_syncdist.cutoff.models import Evaluation, RunTimeModel
from tf_syncdist.cutoff.network import Sizes, Weights

from .regimes import regimes


def random_weights(num_workers: int, seed: int = 0) -> Weights:
    """A network that knows nothing."""
    random = np.random.default_rng(seed)
    sizes = Sizes(num_workers, 4, 5, 6, 7, 8, num_workers)
    arrays = {
        name: (0.1 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in sizes.shapes().items()
    }
    arrays |= {"scale": np.array([0.0, 0.4]), "window": np.array(10), "floor": np.array(0.1)}
    return Weights(**arrays)


def model(
    num_workers: int = 24, nodes: int = 4, factor: float = 2.5, learned: float = 2.0
) -> RunTimeModel:
    """A model with chains that know the cluster, which says that it gives so much per second."""
    seconds = regimes(800, num_workers, nodes, factor, seed=1)
    chains = markov_fit.fit(np.log(seconds), np.ones(seconds.shape, bool))
    evaluation = Evaluation(learned, 0.5, 1.0, max(1, num_workers - 1), 3.0)
    return RunTimeModel(random_weights(num_workers), chains, evaluation)

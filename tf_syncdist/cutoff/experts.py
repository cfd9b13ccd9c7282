"""Several predictors at once, of which the one is followed that has been right of late."""

from collections.abc import Mapping

import numpy as np

from tf_syncdist.cutoff.planning import RoundTimes
from tf_syncdist.cutoff.predictors import Predictor

# A score counts four fifths a round later: a change of the cluster costs a few rounds.
_FORGETTING = 0.8


class Experts:
    """Follows the predictor with the better recent log-score.

    Args:
        predictors: The predictors by name. The first is followed until another is better.

    References:
        Teng, Wood, arXiv 1803.04209, leave open what to do when the cluster changes after training;
        following the best expert with forgetting is Herbster, Warmuth: Tracking the best expert,
        Machine Learning 32, 1998, without its sharing.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        self._predictors = dict(predictors)
        self._recent = dict.fromkeys(predictors, 0.0)
        self._last = dict.fromkeys(predictors, 0.0)
        self._followed = next(iter(self._predictors))
        self._observed = False

    @property
    def followed(self) -> str:
        """The name of the predictor that is followed."""
        return self._followed

    @property
    def last_scores(self) -> dict[str, float]:
        """Each predictor's score of the last round; see `Predictor.log_score`."""
        return dict(self._last)

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over; rounds come in order."""
        for name, predictor in self._predictors.items():
            if self._observed:
                self._last[name] = predictor.log_score(times)
                self._recent[name] = _FORGETTING * self._recent[name] + self._last[name]
            predictor.observe(times)
        self._observed = True
        # max keeps the first of equals, so begin with the one that is followed.
        names = sorted(self._recent, key=lambda name: name != self._followed)
        self._followed = max(names, key=self._recent.__getitem__)

    def samples(self) -> np.ndarray:
        """Returns draws of the next round's times, float32 seconds, [draws, num_workers]."""
        return self._predictors[self._followed].samples()

    def log_score(self, times: RoundTimes) -> float:
        """Returns how likely the followed predictor takes a round to be."""
        return self._predictors[self._followed].log_score(times)

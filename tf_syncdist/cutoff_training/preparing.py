"""What models learn from: a trace without gaps, one part to learn and one to see how well."""

from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff.learned import LEAST_ROUNDS
from tf_syncdist.cutoff.smoothing import Smoother
from tf_syncdist.cutoff.traces import Trace, checked
from tf_syncdist.errors import TraceError

# The newest rounds are held out.
_HELD_OUT = 0.15


class Prepared(NamedTuple):
    """A trace in logarithms.

    Args:
        log_seconds: float64, [rounds, num_workers]. Late and absent workers' are imputed.
        seen: bool, [rounds, num_workers]. Which are not.
        learned: How many rounds are learned from; the others are held out.
    """

    log_seconds: np.ndarray
    seen: np.ndarray
    learned: int


def prepare(trace: Trace) -> Prepared:
    """Fills the gaps of a trace and divides it.

    Args:
        trace: The trace.

    Raises:
        TraceError: If it makes no sense, or is too short.
    """
    checked(trace)
    if trace.num_rounds < LEAST_ROUNDS:
        raise TraceError(
            f"Expected a trace of {LEAST_ROUNDS} rounds at least, better 2,000. "
            f"Received: {trace.num_rounds} round(s). Record a longer one."
        )
    smoother = Smoother(trace.num_workers)
    log_seconds = np.empty(trace.seconds.shape)
    for row, times in zip(log_seconds, trace.rounds(), strict=True):
        smoother.observe(times)
        row[:] = smoother.imputed
    learned = trace.num_rounds - max(1, round(_HELD_OUT * trace.num_rounds))
    return Prepared(log_seconds, ~np.isnan(trace.seconds), learned)

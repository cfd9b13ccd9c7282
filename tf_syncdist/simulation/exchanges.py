"""Workers that exchange models over a network: how many steps they make, event by event.

A step is its computation, and then, in one of so many steps, an exchange. Run-times go in; what an
exchange costs is in `tf_syncdist.mixing.costs`.

References:
    Jin, Yuan, Iandola, Keutzer: How to scale distributed deep learning?, arXiv 1611.04581.
"""

import heapq
from typing import NamedTuple

import numpy as np

from tf_syncdist.mixing import costs
from tf_syncdist.mixing.costs import Network
from tf_syncdist.simulation.jobs import checked


class Pace(NamedTuple):
    """How far workers have come.

    Args:
        steps: int64, [num_workers]. How many steps each has made.
        seconds: In how much time.
    """

    steps: np.ndarray
    seconds: float

    @property
    def per_second(self) -> np.ndarray:
        """Steps per second of each worker."""
        return self.steps / self.seconds

    @property
    def throughput(self) -> float:
        """Steps per second of all workers together."""
        return float(self.steps.sum() / self.seconds)


def all_reduce(seconds: np.ndarray, model_bytes: float, network: Network) -> Pace:
    """Returns the pace of workers that average gradients after every step, and wait for all.

    Args:
        seconds: float64, [steps, num_workers]. How long each worker computes.
        model_bytes: Size of the model.
        network: What joins the workers.

    Raises:
        ValueError: If the times are not positive and finite, or there are none.
    """
    seconds = checked(seconds)
    steps, workers = seconds.shape
    exchange = costs.all_reduce_seconds(model_bytes, workers, network)
    return Pace(np.full(workers, steps), float(seconds.max(axis=1).sum() + steps * exchange))


def elastic(seconds: np.ndarray, model_bytes: float, network: Network, period: int = 1) -> Pace:
    """Returns the pace of workers that exchange with a centre, which serves one at a time.

    It ends when a worker has used all of its times.

    Args:
        seconds: float64, [steps, num_workers]. How long each worker computes.
        model_bytes: Size of the model.
        network: What joins the workers and the centre.
        period: A worker exchanges after one of so many steps.

    Raises:
        ValueError: If the times are not positive and finite, or there are none.
    """
    seconds = checked(seconds)
    busy = costs.centre_seconds(model_bytes, network)
    done = np.zeros(seconds.shape[1], np.int64)
    free_at = 0.0
    # When a worker has computed, and which; who comes first is served first.
    computed = [(float(s), w) for w, s in enumerate(seconds[0])]
    heapq.heapify(computed)
    while True:
        now, worker = heapq.heappop(computed)
        if (done[worker] + 1) % period == 0:
            now = free_at = max(now, free_at) + busy
        done[worker] += 1
        if done[worker] == len(seconds):
            return Pace(done, now)
        heapq.heappush(computed, (now + float(seconds[done[worker], worker]), worker))


def gossip(seconds: np.ndarray, model_bytes: float, network: Network, period: int = 1) -> Pace:
    """Returns the pace of workers that exchange with partners, of which each has its own line.

    It ends when a worker has used all of its times.

    Args:
        seconds: float64, [steps, num_workers]. How long each worker computes.
        model_bytes: Size of the model.
        network: What joins the workers.
        period: A worker exchanges after one of so many steps.

    Raises:
        ValueError: If the times are not positive and finite, or there are none.
    """
    seconds = checked(seconds)
    exchanges = (np.arange(1, len(seconds) + 1) % period == 0)[:, None]
    ends = np.cumsum(seconds + exchanges * costs.gossip_seconds(model_bytes, network), axis=0)
    end = float(ends[-1].min())
    return Pace((ends <= end).sum(axis=0), end)

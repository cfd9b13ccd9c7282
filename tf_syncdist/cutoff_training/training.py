"""Training of a run-time model on a trace."""

import math
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_syncdist.cutoff import markov_fit, replay
from tf_syncdist.cutoff.decisions import least_count
from tf_syncdist.cutoff.learned import experts
from tf_syncdist.cutoff.models import Evaluation, RunTimeModel
from tf_syncdist.cutoff.network import Sizes, Weights
from tf_syncdist.cutoff.traces import Trace
from tf_syncdist.cutoff_training.batches import Batches
from tf_syncdist.cutoff_training.deep_markov import DeepMarkov
from tf_syncdist.cutoff_training.preparing import Prepared, prepare

_WINDOW = 10
_BATCH = 32
_LEARNING_RATE = 2e-3
_RAMP_STEPS = 100
_CLIP_NORM = 10.0
_FLOOR = 0.1
_LEAST_SCALE = 1e-3

# So often, in steps, the bound is computed on what is held out, on so many windows.
_LOOK_STEPS = 100
_HELD_OUT_WINDOWS = 64

# With more workers than this, all share one deviation, and the latent space is larger.
_LARGE = 500

_MIN_FRACTION = 0.25
_KNOWN_ROUNDS = 50


class Progress(NamedTuple):
    """How far a training is.

    Args:
        step: Steps done.
        steps: Steps in all.
        bound: The evidence lower bound on what is held out, in nats per worker and round.
        best: Whether it is the best so far, so that the model is kept.
    """

    step: int
    steps: int
    bound: float
    best: bool


def train(
    trace: Trace,
    *,
    seed: int = 0,
    steps: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> RunTimeModel:
    """Learns how long workers take.

    The last 15 % of the rounds are held out: they choose the best of the networks on the way, and
    tell what it is good for.

    Args:
        trace: The rounds to learn from, 100 at least; from 2,000 a model learns states that are
            rare. Rounds in which everybody was waited for say most.
        seed: Of the network's first values and of all draws.
        steps: How many updates the network gets. Default 2,500, with more than 500 workers 1,500.
        on_progress: Called now and then.

    Returns:
        The model. `evaluation` says whether it is better than fixed cutoffs.

    Raises:
        TraceError: If the trace makes no sense, or is too short.
    """
    prepared = prepare(trace)
    if steps is None:
        steps = 2500 if trace.num_workers <= _LARGE else 1500
    part = slice(prepared.learned)
    chains = markov_fit.fit(prepared.log_seconds[part], prepared.seen[part])
    weights = _network(prepared, chains.group, seed, steps, on_progress)
    model = RunTimeModel(weights, chains, Evaluation(0.0, 0.0, 0.0, 1, 0.0))
    return model._replace(evaluation=evaluate(model, prepared))


def evaluate(model: RunTimeModel, prepared: Prepared) -> Evaluation:
    """Compares a model's cutoffs with fixed ones, in hindsight, on the rounds that are held out.

    Args:
        model: The model.
        prepared: The trace.
    """
    known = min(_KNOWN_ROUNDS, prepared.learned)
    seconds = np.exp(prepared.log_seconds[prepared.learned - known :])
    least = least_count(_MIN_FRACTION, model.num_workers)
    played = replay.replay(experts(model), seconds, least, full_rounds=known)
    held_out = seconds[known:]
    static = replay.static_throughputs(held_out)
    return Evaluation(
        learned=replay.Replay(played.counts[known:], played.seconds[known:]).throughput,
        full_sync=float(static[-1]),
        best_static=float(static.max()),
        best_count=int(static.argmax()) + 1,
        oracle=replay.oracle_throughput(held_out, least),
    )


def _network(
    prepared: Prepared,
    group: np.ndarray,
    seed: int,
    steps: int,
    on_progress: Callable[[Progress], None],
) -> Weights:
    learned = prepared.log_seconds[: prepared.learned]
    mean, deviation = float(learned.mean()), max(float(learned.std()), _LEAST_SCALE)
    times = ((prepared.log_seconds - mean) / deviation).astype(np.float32)
    sizes = _sizes(times.shape[1])
    model = DeepMarkov(sizes, _WINDOW, _FLOOR, seed)
    batches = Batches(times[: prepared.learned], group, _WINDOW, _BATCH, seed)
    random = np.random.default_rng(seed)
    held_out = _windows(times[prepared.learned :])
    held_out_noise = _noise(random, len(held_out), sizes.latent)
    step, look = _functions(model, steps)
    best, kept = -math.inf, model.values()
    for number in range(1, steps + 1):
        # The KL term grows over the first fifth, else q falls back to the prior at once.
        weight = np.float32(min(1.0, 5 * number / steps))
        step(batches.draw(), _noise(random, _BATCH, sizes.latent), weight)
        if number % _LOOK_STEPS == 0 or number == steps:
            bound = float(look(held_out, held_out_noise)) / sizes.workers
            is_best = bound > best
            if is_best:
                best, kept = bound, model.values()
            on_progress(Progress(number, steps, bound, is_best))
    return model.weights(kept, mean, deviation)


def _sizes(num_workers: int) -> Sizes:
    large = num_workers > _LARGE
    return Sizes(
        workers=num_workers,
        latent=64 if large else 32,
        unit=64,
        inference=64,
        move=64,
        emission=128,
        spreads=1 if large else num_workers,
    )


def _functions(model: DeepMarkov, steps: int) -> tuple[Callable, Callable]:
    """Returns the update and the bound as graphs."""
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=_LEARNING_RATE, warmup_steps=min(_RAMP_STEPS, steps // 5)
    )
    optimizer = keras.optimizers.Adam(rate, global_clipnorm=_CLIP_NORM)
    optimizer.build(model.variables)

    @tf.function
    def step(times: tf.Tensor, noise: tf.Tensor, weight: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            likelihood, divergence = model.bound(times, noise)
            loss = weight * divergence - likelihood
        optimizer.apply(tape.gradient(loss, model.variables), model.variables)

    @tf.function
    def look(times: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        likelihood, divergence = model.bound(times, noise)
        return likelihood - divergence

    return step, look


def _windows(times: np.ndarray) -> np.ndarray:
    last = len(times) - _WINDOW
    begins = np.unique(np.linspace(0, last, _HELD_OUT_WINDOWS).astype(int))
    return times[begins[:, None] + np.arange(_WINDOW)]


def _noise(random: np.random.Generator, size: int, latent: int) -> np.ndarray:
    return random.standard_normal((size, _WINDOW, latent), np.float32)

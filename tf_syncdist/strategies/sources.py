"""Decides, batch by batch, whether a worker reads its input at all, and when a pass over it ends.

A worker that is behind does not read what it is not going to compute with: a round that is over
never opens again, so the batch before stands in for the one of a replay. And where nobody knows how
long the input is, workers agree on where it ends for all of them.
"""

import functools
import threading
from typing import Any

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies.controller import RunController
from tf_syncdist.strategies.inputs import as_it_is
from tf_syncdist.transport.session import Session

_READ, _REPEAT, _END = 0, 1, -1


class _Pass:
    """One iteration over the input; all workers begin it after the same run, which is its name."""

    def __init__(self, run: int) -> None:
        self.begin = run
        self.run = run
        self.skipped = False


class Source:
    """Watches one distributed dataset.

    Args:
        session: The connection to the service.
        controller: Takes this worker through its runs.
        ends: Whether workers have to agree on the end, because its place is not known.
        alike: Whether the input of all workers has the same length.
        skips: Whether a worker that is behind does without reading; every batch is for one run.
    """

    def __init__(
        self, session: Session, controller: RunController, ends: bool, alike: bool, skips: bool
    ) -> None:
        self._session = session
        self._controller = controller
        self._ends = ends
        self._alike = alike
        self._skips = skips
        self._passes: dict[int, _Pass] = {}
        self._now: _Pass | None = None
        self._lock = threading.Lock()
        self._previous: list[np.ndarray] | None = None

    def watch(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Returns the dataset with a decision before each of its batches."""
        spec = dataset.element_spec
        flat = tf.nest.flatten(spec, expand_composites=True)

        @as_it_is
        def remember(*batch: Any) -> Any:
            batch = batch[0] if len(batch) == 1 else batch
            tensors = tf.nest.flatten(batch, expand_composites=True)
            kept = [t for t in tensors if tf.is_tensor(t) and t.dtype is not tf.variant]
            done = tf.numpy_function(self._remember, kept, tf.int64)
            with tf.control_dependencies([done]):
                return tf.nest.map_structure(tf.identity, batch, expand_composites=True)

        @as_it_is
        def previous(*_: Any) -> Any:
            dtypes = [s.dtype for s in flat]
            found = tf.numpy_function(functools.partial(self._previous_or, flat), [], dtypes)
            for value, like in zip(found, flat, strict=True):
                value.set_shape(like.shape)
            return tf.nest.pack_sequence_as(spec, list(found), expand_composites=True)

        endless = tf.data.Dataset.counter()
        repeated = endless.map(previous)
        # What may be read ahead is the dataset itself, but no decision.
        real = dataset.prefetch(1).map(remember)
        if self._ends:
            after = endless.map(
                as_it_is(lambda _: tf.numpy_function(self._out_of_data, [], tf.bool))
            )
            real = real.concatenate(
                after.take_while(as_it_is(lambda goes_on: goes_on)).map(previous)
            )

        @as_it_is
        def choices(number: tf.Tensor) -> tf.data.Dataset:
            @as_it_is
            def choose(index: tf.Tensor) -> tf.Tensor:
                choice = tf.numpy_function(self._choose, [number, index], tf.int64)
                choice.set_shape(())
                return choice

            return endless.map(choose).take_while(as_it_is(lambda choice: choice >= 0))

        begin = tf.data.Dataset.range(1).map(as_it_is(self._numbered))
        chosen = tf.data.Dataset.choose_from_datasets([real, repeated], begin.flat_map(choices))
        # Nothing may be decided ahead of its run: a vote for the end would wait for workers that
        # are past the last run, and these for this worker.
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        return chosen.with_options(options)

    def _numbered(self, _: tf.Tensor) -> tf.Tensor:
        number = tf.numpy_function(self._begin_pass, [], tf.int64)
        number.set_shape(())
        return number

    # Called by tf.data.

    def _begin_pass(self) -> np.int64:
        with self._lock:
            number = max(self._passes, default=-1) + 1
            # A look at the first batch may still be under way, but nothing older.
            self._passes = {n: p for n, p in self._passes.items() if n >= number - 2}
            self._passes[number] = _Pass(self._controller.input.begin_pass(self._controller.run))
            self._controller.input.may_end = self._controller.input.may_end or self._ends
            return np.int64(number)

    def _choose(self, number: np.int64, index: np.int64) -> np.int64:
        now = self._now = self._passes[int(number)]
        # A custom loop may do several runs with a batch, but no run that is over opens again.
        now.run = max(now.begin + int(index), self._controller.run)
        if self._ends and not self._session.enter_run(now.begin, now.run):
            return np.int64(_END)
        behind = self._skips and self._previous is not None and self._controller.replays(now.run)
        now.skipped = now.skipped or behind
        return np.int64(_REPEAT if behind else _READ)

    def _out_of_data(self) -> np.bool_:
        now = self._now
        is_length = self._alike and not now.skipped
        if self._session.vote_end(now.begin, now.run, is_length):
            return np.bool_(False)
        self._controller.input.has_read(now.begin, now.run)
        return np.bool_(True)

    def _remember(self, *arrays: np.ndarray) -> np.int64:
        if self._ends:
            self._controller.input.has_read(self._now.begin, self._now.run)
        self._previous = list(arrays)
        return np.int64(0)

    def _previous_or(self, specs: list[tf.TensorSpec]) -> list[np.ndarray]:
        if self._previous is not None:
            return self._previous
        # A worker that has never read anything is given nothing, in the right shapes.
        return [np.zeros([d or 0 for d in s.shape], s.dtype.as_numpy_dtype) for s in specs]

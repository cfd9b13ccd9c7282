"""A process of benchmarks.mixing that is a worker of a job."""

from __future__ import annotations

import json
import os
import time
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import tf_syncdist
from benchmarks import mixing_control, mixing_task
from benchmarks.mixing_settings import Settings
from examples.mnist_data import Dataset

_WARMUP_STEPS = 3
# How many steps a worker may be ahead of another one where each step waits for all.
_MOST_AHEAD = 4


class Job(NamedTuple):
    """What to train.

    Args:
        strategy: Its name, as the parent has it.
        seed: Seed of the weights and of the order of the data.
        learning_rate: Of each worker.
        step_seconds: How long a step sleeps.
        delay_seconds: How much longer a step of the last worker sleeps.
        addresses: Of the workers.
    """

    strategy: str
    seed: int
    learning_rate: float
    step_seconds: float
    delay_seconds: float
    addresses: list[str]

    @property
    def is_in_step(self) -> bool:
        """Whether every run waits for every worker."""
        return self.strategy in ("sync_replicas", "model_averaging")


def _make_strategy(name: str) -> Any:
    options = {"print_report": False}
    name, _, mode = name.partition(":")
    if mode:
        return tf_syncdist.GossipStrategy(mode=mode, **options)
    return {
        "sync_replicas": tf_syncdist.SyncReplicasStrategy,
        "model_averaging": tf_syncdist.ModelAveragingStrategy,
        "elastic_averaging": tf_syncdist.ElasticAveragingStrategy,
        "async": tf_syncdist.AsyncStrategy,
    }[name](**options)


class _Worker:
    """A worker of one job.

    Args:
        job: The job.
        index: Which worker.
        settings: How to train.
        data: The data.
        control: What the workers of the job tell one another.
    """

    def __init__(
        self,
        job: Job,
        index: int,
        settings: Settings,
        data: Dataset,
        control: mixing_control.Control,
    ) -> None:
        self._job = job
        self._index = index
        self._settings = settings
        self._data = data
        self._control = control
        is_delayed = index == len(job.addresses) - 1
        self._sleep_seconds = job.step_seconds + job.delay_seconds * is_delayed
        self._strategy = _make_strategy(job.strategy)
        self._judge = mixing_task.Judge(data, settings)
        keras.utils.set_random_seed(job.seed)
        with self._strategy.scope():
            self._model = mixing_task.build(data.x_train.shape[1:], settings)
            # A rate of 0 leaves all models as they are, so steps of a warm-up need not be undone.
            self._optimizer = keras.optimizers.SGD(0.0, momentum=0.9)
            self._optimizer.build(self._model.trainable_variables)
        self._step = self._make_step()
        self._batches = iter(self._strategy.experimental_distribute_dataset(self._input()))

    def _input(self) -> tf.data.Dataset:
        size = self._settings.batch_size
        if self._job.strategy == "sync_replicas":
            # Its batch is that of all workers together.
            size *= len(self._job.addresses)
        data = tf.data.Dataset.from_tensor_slices((self._data.x_train, self._data.y_train))
        data = data.shuffle(len(self._data.x_train), seed=self._job.seed)
        return data.batch(size, drop_remainder=True).repeat()

    def _make_step(self) -> Any:
        model, optimizer, loss_of = self._model, self._optimizer, mixing_task.loss_function()

        def sleep(images: np.ndarray) -> np.ndarray:
            time.sleep(self._sleep_seconds)
            return images

        def step_fn(images: tf.Tensor, labels: tf.Tensor) -> None:
            # It stands for the computing of a device of the worker's own: workers share cores here.
            slept = tf.numpy_function(sleep, [images], images.dtype)
            slept.set_shape(images.shape)
            with tf.GradientTape() as tape:
                loss = loss_of(labels, model(slept, training=True))
                loss /= self._strategy.num_replicas_in_sync
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        @tf.function
        def step(images: tf.Tensor, labels: tf.Tensor) -> None:
            self._strategy.run(step_fn, args=(images, labels))

        return step

    def train(self) -> dict[str, Any]:
        """Trains until worker 0 has reached the target, and returns what came of it."""
        before = self._model.get_weights()
        for _ in range(_WARMUP_STEPS):
            self._step(*next(self._batches))
        after = self._model.get_weights()
        if self._index == 0 and not all(map(np.allclose, before, after)):
            raise AssertionError(
                "Expected the warm-up to leave the model as it was. Received: another one. The "
                "times of this job mean nothing: look for the error in its strategy."
            )
        self._control.meet()
        self._optimizer.learning_rate.assign(self._job.learning_rate)
        stopwatch = mixing_task.Stopwatch()
        tests = mixing_task.Tests(self._judge, stopwatch, self._settings)
        steps = 0
        while steps < self._control.last_step:
            self._step(*next(self._batches))
            steps += 1
            self._control.note_steps(steps)
            if self._index == 0:
                self._test(steps, tests)
            elif not self._job.is_in_step and self._control.is_paused:
                with stopwatch.pause():
                    self._control.wait_for_test()
        seconds = stopwatch.seconds
        self._control.meet()
        return {"steps": steps, "seconds": seconds, **tests.summary()}

    def _test(self, steps: int, tests: mixing_task.Tests) -> None:
        if self._control.last_step != mixing_control.FOREVER:
            return
        workers = len(self._job.addresses)
        images = steps * workers if self._job.is_in_step else self._control.steps_of_all
        epochs = images * self._settings.batch_size / len(self._data.x_train)
        if tests.are_due(epochs):
            with self._control.pause():
                is_over = tests.stop(epochs, self._model.get_weights)
            if is_over:
                # Where nobody waits, a slow worker is far behind: all end now.
                self._control.last_step = steps + _MOST_AHEAD if self._job.is_in_step else 0


def train(
    job: Job, index: int, settings: Settings, data: Dataset, control: mixing_control.Control
) -> dict[str, Any]:
    """Trains as a worker of a job, and returns what came of it.

    Args:
        job: The job.
        index: Which worker.
        settings: How to train.
        data: The data.
        control: What the workers of the job tell one another.
    """
    task = {"cluster": {"worker": job.addresses}, "task": {"type": "worker", "index": index}}
    os.environ["TF_CONFIG"] = json.dumps(task)
    # Workers share the cores: more threads than these would only get in one another's way.
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
    return _Worker(job, index, settings, data, control).train()

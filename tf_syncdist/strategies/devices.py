"""What this process computes with."""

import os

import tensorflow as tf


def operation_threads() -> int:
    """Returns how many operations TensorFlow executes at a time."""
    return tf.config.threading.get_inter_op_parallelism_threads() or len(os.sched_getaffinity(0))


def local_devices() -> list[str]:
    """Returns this process's GPUs, or else its CPU devices."""
    gpus = tf.config.list_logical_devices("GPU")
    return [d.name for d in gpus or tf.config.list_logical_devices("CPU")]

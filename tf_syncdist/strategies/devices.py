"""What this process computes with."""

import os

import tensorflow as tf

INTRAOP_THREADS = "TF_NUM_INTRAOP_THREADS"


def operation_threads() -> int:
    """Returns how many operations TensorFlow executes at a time."""
    return tf.config.threading.get_inter_op_parallelism_threads() or len(os.sched_getaffinity(0))


def cuts_operations() -> bool:
    """Returns whether TensorFlow computes on CPUs, and cuts each operation over several cores."""
    asked = tf.config.threading.get_intra_op_parallelism_threads()
    told = os.environ.get(INTRAOP_THREADS, "")
    asked = asked or (int(told) if told.isdecimal() else 0)
    return (asked or len(os.sched_getaffinity(0))) > 1 and not tf.config.list_logical_devices("GPU")


def local_devices() -> list[str]:
    """Returns this process's GPUs, or else its CPU devices."""
    gpus = tf.config.list_logical_devices("GPU")
    return [d.name for d in gpus or tf.config.list_logical_devices("CPU")]

"""One process of benchmarks.tracing: times the first step of models that it has not seen."""

import faulthandler
import json
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_syncdist

_SYSTEM = flags.DEFINE_enum("system", "ours", ["ours", "mirrored"], "The strategy.")
_RESULT_FILE = flags.DEFINE_string("result_file", None, "Where the result goes.", required=True)
_GIVE_UP_AT = flags.DEFINE_float("give_up_at", None, "time.time() of the end.", required=True)
_MODELS = flags.DEFINE_integer("models", 8, "How many models are timed.")


def main(argv: list[str]) -> None:
    """Times `fit` of one step, again and again with a new model."""
    del argv
    faulthandler.dump_traceback_later(max(0.1, _GIVE_UP_AT.value - time.time()), exit=True)
    if _SYSTEM.value == "ours":
        strategy = tf_syncdist.SyncReplicasStrategy(print_report=False)
    else:
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    x, y = np.zeros((32, 16), "float32"), np.zeros((32, 4), "float32")
    seconds = []
    for _ in range(_MODELS.value + 1):
        with strategy.scope():
            layers = [keras.layers.Dense(32, activation="relu") for _ in range(3)]
            model = keras.Sequential([keras.Input((16,)), *layers, keras.layers.Dense(4)])
            model.compile("adam", "mse", metrics=["mae"])
        begin = time.perf_counter()
        model.fit(x, y, batch_size=32, verbose=0)
        seconds.append(time.perf_counter() - begin)
    # The first model pays for what TensorFlow and Keras load when they are first used.
    pathlib.Path(_RESULT_FILE.value).write_text(json.dumps({"seconds": seconds[1:]}))


if __name__ == "__main__":
    app.run(main)

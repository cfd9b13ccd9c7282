"""Counts its steps in a variable that workers mix, whatever happens: every step adds one to it."""

import os
import time
from pathlib import Path
from typing import Any

import keras
import member
import tensorflow as tf

import tf_syncdist

ARGUMENTS = member.ARGUMENTS
LIFE = os.environ["TF_SYNCDIST_TEST_LIFE"]
STRATEGIES = {
    "elastic": tf_syncdist.ElasticAveragingStrategy,
    "gossip": tf_syncdist.GossipStrategy,
    "async": tf_syncdist.AsyncStrategy,
}


def is_done(number: int) -> bool:
    """Returns whether this worker has made all its steps.

    The late one makes more of them until another's last life has made some with it.
    """
    if number < ARGUMENTS["steps"]:
        return False
    last = Path(LIFE).parent / f"{ARGUMENTS['last']}.trace"
    is_late = f"worker-{ARGUMENTS['late']}." in LIFE
    enough = last.exists() and last.read_text().count("\n") >= ARGUMENTS["together"]
    return not is_late or enough or number > 10 * ARGUMENTS["steps"]


def main() -> None:
    if Path(LIFE).name == f"worker-{ARGUMENTS['late']}.life-0":
        member.wait_for("worker-0.life-0", ARGUMENTS["late_by"] + 1)
    strategy: Any = STRATEGIES[ARGUMENTS["kind"]](
        connect_timeout_seconds=60.0,
        timeout_seconds=60.0,
        detection_seconds=1.0,
        **ARGUMENTS["options"],
    )
    with strategy.scope():
        value = keras.Variable(tf.zeros([4]), trainable=True, name="value")
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([value])

    def replica_step() -> tf.Tensor:
        before = value.value[0] + 0.0
        with tf.control_dependencies([before]):
            optimizer.apply_gradients([(-tf.ones([4]), value)])
        return before

    @tf.function
    def step() -> tf.Tensor:
        return strategy.run(replica_step)

    holds = ARGUMENTS["holds"].get(Path(LIFE).name, {})
    with open(f"{LIFE}.trace", "a", buffering=1) as trace:
        number = 0
        while not is_done(number):
            number += 1
            begun = time.monotonic()
            before = float(step())
            # The first one is traced, and waits for others to begin.
            took = time.monotonic() - begun if number > 1 else 0.0
            trace.write(f"{number} {before} {took}\n")
            if str(number) in holds:
                member.hold(holds[str(number)])
            time.sleep(ARGUMENTS["step_seconds"])
    strategy.synchronize()
    end = float(value.numpy()[0])
    report = strategy.report()
    member.write(
        strategy,
        keras.Sequential(),
        optimizer,
        end=end,
        own=report.own._asdict(),
        report_text=str(report),
    )


main()

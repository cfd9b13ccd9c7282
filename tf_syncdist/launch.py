"""Runs a training script as a job of several workers on this machine.

    python -m tf_syncdist.launch --num_workers=3 train.py --epochs=5
    python -m tf_syncdist.launch --num_workers=3 --num_ps=1 -m package.train --epochs=5

Flags before the script are the launcher's, everything after it belongs to the script. Each worker
finds its place in the cluster in TF_CONFIG, and each line of its output is shown with its name.
"""

from collections.abc import Sequence

from absl import app, flags

from tf_syncdist.cluster import arguments, launcher

_NUM_WORKERS = flags.DEFINE_integer("num_workers", None, "How many processes run the script.")
_NUM_PS = flags.DEFINE_integer("num_ps", 0, "How many aggregation services are started.")
_GRACE_SECONDS = flags.DEFINE_float(
    "grace_seconds",
    5.0,
    "How long tasks may take to end after a signal before they get SIGTERM, and then SIGKILL. "
    "Raise it if workers need longer to save a checkpoint.",
)
_STOP_ON_FAILURE = flags.DEFINE_boolean(
    "stop_on_failure", False, "Whether to stop all tasks when one has failed."
)
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts",
    0,
    "How often each task that fails is started again, after a pause that grows from 0.5 to 30 s. "
    "The task finds the number of its restarts in TF_SYNCDIST_RESTARTS.",
)
_FILTER_TF_STARTUP = flags.DEFINE_boolean(
    "filter_tf_startup",
    True,
    "Whether to drop TensorFlow's C++ start-up messages of severity I from the error output.",
)


def main(argv: Sequence[str]) -> int:
    """Runs the job that the flags describe.

    Args:
        argv: The program's name and the command.

    Returns:
        The exit status.
    """
    try:
        return launcher.launch(
            argv[1:],
            _NUM_WORKERS.value or 0,
            _NUM_PS.value,
            grace_seconds=_GRACE_SECONDS.value,
            stop_on_failure=_STOP_ON_FAILURE.value,
            max_restarts=_MAX_RESTARTS.value,
            filter_tf_startup=_FILTER_TF_STARTUP.value,
        )
    except KeyboardInterrupt:
        # Before there was a job.
        return 130
    except arguments.LaunchError as error:
        arguments.report_usage_error(error)
        return arguments.USAGE_EXIT_CODE


if __name__ == "__main__":
    app.run(main, flags_parser=arguments.parse_flags)

"""The launcher's command line: which arguments are the launcher's, and which the script's."""

import math
import os
import sys
from collections.abc import Callable, Sequence

from absl import flags

from tf_syncdist.errors import SyncDistError

USAGE_EXIT_CODE = 2
"""Exit code of a launcher that was called in a wrong way, as usual in a shell."""


class LaunchError(SyncDistError, ValueError):
    """The launcher was asked for something it cannot start."""


def split_arguments(
    arguments: Sequence[str], takes_value: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Splits the launcher's flags from the command that its workers run.

    The command starts with the first argument that is no flag, with `-m`, or after `--`.

    Args:
        arguments: The command line without the program's name.
        takes_value: Says of a flag, by its name without hyphens, whether its value may stand
            in the argument after it.

    Returns:
        The launcher's flags, and the command.
    """
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--":
            return list(arguments[:position]), list(arguments[position + 1 :])
        if not argument.startswith("-") or argument == "-m":
            break
        name, has_value, _ = argument.lstrip("-").partition("=")
        position += 1 if has_value or not takes_value(name) else 2
    return list(arguments[:position]), list(arguments[position:])


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the launcher's flags and leaves those of the script alone; for `app.run`.

    Args:
        argv: The command line with the program's name.

    Returns:
        The program's name and the command.

    Raises:
        SystemExit: If a flag of the launcher is unknown or has a wrong value.
    """
    values = flags.FLAGS

    def takes_value(name: str) -> bool:
        return name in values and not values[name].boolean

    own, command = split_arguments(argv[1:], takes_value)
    try:
        values([argv[0], *own])
    except flags.Error as error:
        reason = str(error).rstrip(".")
        report_usage_error(
            f"{reason}. Flags before the script are the launcher's (see --help), those after it "
            "are the script's."
        )
        sys.exit(USAGE_EXIT_CODE)
    return [argv[0], *command]


def report_usage_error(message: object) -> None:
    """Prints a one-line error.

    Args:
        message: What is wrong, and what to do.
    """
    print("tf_syncdist.launch: error:", " ".join(str(message).split()), file=sys.stderr)


def check_arguments(
    command: Sequence[str],
    num_workers: int,
    num_ps: int,
    grace_seconds: float,
    max_restarts: int = 0,
) -> None:
    """Checks what a job is to be started with.

    Args:
        command: A script and its arguments, or `-m`, a module and its arguments.
        num_workers: How many workers.
        num_ps: How many aggregation services.
        grace_seconds: How long a task that was asked to end may take.
        max_restarts: How often a failed task is started again.

    Raises:
        LaunchError: If no job can be started with that.
    """
    if num_workers < 1:
        raise LaunchError(
            f"Expected at least 1 worker. Received: num_workers={num_workers}. "
            "Give the number of workers, such as --num_workers=2."
        )
    if num_ps < 0:
        raise LaunchError(
            f"Expected 0 or more aggregation services. Received: num_ps={num_ps}. "
            "Leave --num_ps out to start none."
        )
    if not (math.isfinite(grace_seconds) and grace_seconds >= 0):
        raise LaunchError(
            "Expected a finite number of seconds that is not negative. "
            f"Received: grace_seconds={grace_seconds}. Use 0 to give tasks no time to end."
        )
    if max_restarts < 0:
        raise LaunchError(
            "Expected how often a failed task is started again, 0 or more. "
            f"Received: max_restarts={max_restarts}. Leave --max_restarts out for never."
        )
    if not command:
        raise LaunchError(
            "Expected a script to run. Received: none. Name it after the launcher's flags, as in "
            "--num_workers=2 train.py, or --num_workers=2 -m package.module."
        )
    if command[0] == "-m":
        if len(command) < 2:
            raise LaunchError(
                "Expected the name of a module after -m. Received: nothing. "
                "Write it as in -m package.module."
            )
    elif not _is_script(command[0]):
        raise LaunchError(
            f"Expected the path of a Python script. Received: {command[0]!r}, which is no file in "
            f"{os.getcwd()}. Check the path, or name a module as in -m package.module."
        )


def _is_script(path: str) -> bool:
    # Python also runs a directory that has a __main__.py.
    return os.path.isfile(path) or os.path.isfile(os.path.join(path, "__main__.py"))

"""Cutoff policies by the names that command lines use."""

from collections.abc import Callable

from tf_syncdist.cutoff import (
    BackupWorkers,
    CutoffPolicy,
    Deadline,
    Elfving,
    FullSync,
    OrderStatistics,
)
from tf_syncdist.cutoff.learned import LearnedCutoff
from tf_syncdist.simulation.bounds import GreedyOracle
from tf_syncdist.simulation.laws import positive_number

FORMS = (
    "full, backup:B, deadline:SECONDS, elfving, elfving:WINDOW, order_statistics, "
    "order_statistics:WINDOW, learned, learned:FILE, oracle"
)


def cutoff(text: str, num_workers: int) -> CutoffPolicy:
    """Returns the cutoff policy of a name.

    Args:
        text: The name, one of `FORMS`.
        num_workers: How many workers it is to be used with.

    Raises:
        ValueError: If there is no such policy, or it does not fit the workers.

    Example:

    >>> cutoff("backup:4", num_workers=100)
    BackupWorkers(b=4)
    """
    name, colon, value = text.partition(":")
    make = _POLICIES.get(name)
    if (
        make is None
        or (name in ("full", "oracle") and colon)
        or (name in ("backup", "deadline") and not colon)
    ):
        raise ValueError(f"Expected a cutoff of the form {FORMS}. Received: {text!r}.")
    policy = make(value if colon else None, text)
    try:
        policy.replicas_to_aggregate(num_workers)
    except ValueError as e:
        raise ValueError(f"{e} This is about {text!r}.") from e
    return policy


def _integer(value: str, form: str, text: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"Expected {form} with an integer. Received: {text!r}.")
    return int(value)


def _backup(value: str | None, text: str) -> CutoffPolicy:
    return BackupWorkers(_integer(value or "", "backup:B", text))


def _deadline(value: str | None, text: str) -> CutoffPolicy:
    return Deadline(positive_number(value or "", "deadline:SECONDS", text))


def _windowed(cls: type) -> Callable[[str | None, str], CutoffPolicy]:
    def make(value: str | None, text: str) -> CutoffPolicy:
        if value is None:
            return cls()
        return cls(_integer(value, f"{text.partition(':')[0]}:WINDOW", text))

    return make


def _learned(value: str | None, text: str) -> CutoffPolicy:
    if value == "":
        raise ValueError(f"Expected learned:FILE with a file. Received: {text!r}.")
    return LearnedCutoff() if value is None else LearnedCutoff.load(value)


_POLICIES: dict[str, Callable[[str | None, str], CutoffPolicy]] = {
    "full": lambda value, text: FullSync(),
    "backup": _backup,
    "deadline": _deadline,
    "elfving": _windowed(Elfving),
    "order_statistics": _windowed(OrderStatistics),
    "learned": _learned,
    "oracle": lambda value, text: GreedyOracle(),
}

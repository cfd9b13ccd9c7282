"""What all tests begin with."""

import signal

import pytest

# The files that take longest, in the order of how long. Workers of pytest-xdist begin with them, so
# that none of them is left alone with one in the end.
_LONG = (
    "multi_worker/test_optimizers.py",
    "multi_worker/test_corners.py",
    "multi_worker/test_callbacks.py",
    "multi_worker/test_devices.py",
    "multi_worker/test_propagation.py",
    "multi_worker/test_exchanges.py",
    "multi_worker/test_data_plane.py",
    "examples/test_examples.py",
    "faults/test_workers.py",
    "multi_worker/test_endings.py",
    "multi_worker/test_backups.py",
    "multi_worker/test_interrupts.py",
    "faults/test_services.py",
    "faults/test_propagation.py",
    "multi_worker/test_auto_propagation.py",
    "multi_worker/test_differences.py",
    "multi_worker/test_deferred_uses.py",
    "multi_worker/test_tracing.py",
    "multi_worker/test_model_averaging.py",
    "multi_worker/test_nonfinite.py",
    "multi_worker/test_local_state.py",
    "multi_worker/test_overflow.py",
    "multi_worker/test_refusals.py",
    "multi_worker/test_failures.py",
    "multi_worker/test_equivalence.py",
    "transport/test_deferral.py",
    "faults/test_network.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Lets the processes that tests start have signals, also under nohup and behind a `&`.

    Whoever starts pytest like that has signals ignored, and what a process ignores, those that it
    starts ignore too. What it handles, they do not inherit.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    # pytest-xdist would begin with the files that have the most tests.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the files that take longest first."""
    tests = config.rootpath / "tests"
    rank = {tests / name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))

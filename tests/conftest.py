"""What all tests begin with."""

import signal


def pytest_configure() -> None:
    """Lets the processes that tests start have signals, also under nohup and behind a `&`.

    Whoever starts pytest like that has signals ignored, and what a process ignores, those that it
    starts ignore too. What it handles, they do not inherit.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)

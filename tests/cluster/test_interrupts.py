"""Ctrl-C and SIGTERM, in processes of their own."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import tf_syncdist
from tf_syncdist.cluster import interrupts

pytestmark = pytest.mark.timeout(60)

_ROOT = Path(tf_syncdist.__file__).parents[1]

BEGIN = """
import hashlib, os, signal, sys, threading, time
# A shell without job control starts programs that ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tf_syncdist.cluster import interrupts
from tf_syncdist.cluster.interrupts import InterruptWatcher
told = []
watcher = InterruptWatcher(lambda number: told.append(number.name))

def ready():
    # Nothing that is printed, and not flushed yet, comes with it.
    os.write(1, b"ready\\n")

def until(there):
    deadline = time.monotonic() + 40
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)

def ready_once_stuck():
    clock = time.pthread_getcpuclockid(threading.main_thread().ident)
    # So much computing is done nowhere else.
    least = time.clock_gettime(clock) + 0.03
    def wait():
        until(lambda: time.clock_gettime(clock) > least)
        ready()
    threading.Thread(target=wait, daemon=True).start()

def stuck():
    # Lasts about a minute, and no signal cuts it short.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
"""

# So that a busy machine may hold up an orderly end, or a thread, for a while. Where the end is by
# one of these deadlines, a program sets it back.
PATIENT = """
for name in ("_GRACE_SECONDS", "_FLUSH_SECONDS", "_POLITE_SECONDS", "_SOONER_SECONDS"):
    setattr(interrupts, name, 20.0)
"""


class Ended:
    """Runs code until it has printed "ready", sends signals, and waits for the end."""

    def __init__(self, code: str, *numbers: signal.Signals, begin: str = BEGIN + PATIENT) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", begin + textwrap.dedent(code)],
            # What is printed is to be kept back until it is flushed.
            env={**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Nothing that comes after the first line is to be read with it.
            bufsize=0,
        )
        try:
            assert process.stdout.readline() == b"ready\n", process.stderr.read()
            time.sleep(0.3)
            started = time.monotonic()
            for number in numbers:
                process.send_signal(number)
                time.sleep(0.3 * (len(numbers) > 1))
            output, errors = process.communicate(timeout=40)
            self.output, self.errors = output.decode(), errors.decode()
            self.seconds = time.monotonic() - started
            self.status = process.returncode
        finally:
            process.kill()
            process.wait(10)


def test_sigterm_ends_a_program_in_order_and_without_a_word() -> None:
    code = """
        import atexit
        atexit.register(lambda: print("at exit", told, watcher.received.name))
        try:
            ready()
            time.sleep(30)
        finally:
            time.sleep(0.5)
            until(lambda: told)
            print("finally")
    """
    ended = Ended(code, signal.SIGTERM)
    assert ended.status == 143
    assert ended.output == "finally\nat exit ['SIGTERM'] SIGTERM\n"
    assert ended.errors == ""


def test_a_second_sigterm_changes_nothing() -> None:
    code = """
        try:
            ready()
            time.sleep(30)
        finally:
            time.sleep(1.5)
            print("finally")
    """
    ended = Ended(code, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)
    assert (ended.status, ended.output, ended.errors) == (143, "finally\n", "")


def test_one_signal_is_one_exception_where_the_main_thread_acts_on_it_first() -> None:
    code = """
        act = interrupts._Watch._act
        def late(watch, number):
            time.sleep(1.0)
            act(watch, number)
        interrupts._Watch._act = late
        try:
            ready()
            time.sleep(30)
        except KeyboardInterrupt:
            until(lambda: told)
            time.sleep(0.5)
            print("saved")
    """
    ended = Ended(code, signal.SIGINT)
    assert (ended.status, ended.output, ended.errors) == (0, "saved\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_that_computes_without_looking_up_is_ended(number: signal.Signals) -> None:
    code = """
        interrupts._GRACE_SECONDS = 3.0
        print("kept", end="")
        ready_once_stuck()
        stuck()
    """
    ended = Ended(code, number)
    assert ended.status == 128 + number
    assert ended.seconds < 20 and ended.output == "kept"
    assert ended.errors == ""


def test_a_process_is_ended_within_five_seconds_where_nothing_holds_it_up() -> None:
    assert interrupts._GRACE_SECONDS + interrupts._FLUSH_SECONDS < 5


def test_a_program_whose_end_takes_too_long_is_ended() -> None:
    code = """
        interrupts._GRACE_SECONDS = 3.0
        try:
            ready()
            time.sleep(30)
        finally:
            stuck()
    """
    ended = Ended(code, signal.SIGTERM)
    assert ended.status == 143 and ended.seconds < 20


def test_a_keyboard_interrupt_is_the_programs_own_affair() -> None:
    code = """
        try:
            try:
                raise ValueError("what TensorFlow says of a step that was cut short")
            except ValueError:
                ready()
                time.sleep(30)
        except KeyboardInterrupt as e:
            assert e.__suppress_context__
            until(lambda: told)
            # From then on nobody is left who would end it.
            until(lambda: "tf_syncdist_end" not in [t.name for t in threading.enumerate()])
            time.sleep(1)
            print("saved", told)
    """
    ended = Ended(code, signal.SIGINT)
    assert (ended.status, ended.output, ended.errors) == (0, "saved ['SIGINT']\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_exception_that_is_being_made_is_finished_first(number: signal.Signals) -> None:
    code = """
        made = []

        class Slow(Exception):
            def __init__(self):
                ready()
                while not told:
                    pass
                # The main thread is sent the signal again and again meanwhile.
                end = time.monotonic() + 0.5
                while time.monotonic() < end:
                    pass
                made.append(1)

        try:
            Slow()
            time.sleep(30)
        finally:
            print(made, told)
    """
    ended = Ended(code, number)
    assert ended.status == (143 if number == signal.SIGTERM else -number)
    assert ended.output == f"[1] ['{number.name}']\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_library_does_not_lose_an_interrupt(number: signal.Signals) -> None:
    """Where an object is destroyed Python prints an exception and forgets it."""
    code = """
        import weakref

        class Key:
            pass

        held = weakref.WeakKeyDictionary()
        ready()
        while True:
            held[Key()] = 1
    """
    ended = Ended(code, number)
    assert ended.status == (143 if number == signal.SIGTERM else -number)
    # Else it would have been ended after 20 s.
    assert "ignored" not in ended.errors and ended.seconds < 15


def test_a_library_that_does_not_come_back_is_interrupted() -> None:
    code = "interrupts._POLITE_SECONDS = 1.0; ready(); threading.Event().wait(30)"
    ended = Ended(code, signal.SIGINT)
    assert ended.status == -signal.SIGINT and ended.seconds < 15


def test_an_interrupt_that_nobody_catches_has_its_usual_end() -> None:
    ended = Ended("ready(); time.sleep(30)", signal.SIGINT)
    assert ended.status == -signal.SIGINT
    assert ended.errors.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize("when", ["before", "after"])
def test_handlers_of_the_program_are_left_alone(when: str) -> None:
    install = """
seen = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: seen.append(number))
"""
    begin = install + BEGIN.replace("signal.signal(signal.SIGINT", "(lambda *_: 0)(signal.SIGINT")
    if when == "after":
        begin = BEGIN + install
    code = """
        ready()
        while len(seen) < 2:
            time.sleep(0.02)
        time.sleep(3.5)
        # What comes while it is held up is handled in the order of the numbers.
        print(sorted(seen), told)
    """
    begin = "import signal\n" + begin
    ended = Ended(code, signal.SIGTERM, signal.SIGINT, begin=begin)
    assert (ended.status, ended.output, ended.errors) == (0, "[2, 15] []\n", "")


def test_nothing_is_installed_outside_of_the_main_thread() -> None:
    code = """
        watcher.close()
        thread = threading.Thread(target=lambda: InterruptWatcher(told.append))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ready()
        time.sleep(30)
    """
    assert Ended(code, signal.SIGTERM).status == -signal.SIGTERM


def test_everything_is_put_back_by_the_last_one() -> None:
    code = """
        other = InterruptWatcher(lambda number: told.append("other"))
        watcher.close()
        watcher.close()
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        other.close()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.set_wakeup_fd(-1) == -1
        for _ in range(300):
            InterruptWatcher(told.append).close()
        with InterruptWatcher(lambda number: told.append("new")) as new:
            ready()
            try:
                time.sleep(30)
            except KeyboardInterrupt:
                until(lambda: told)
                print(told, new.received.name)
        until(lambda: threading.active_count() < 10)
    """
    ended = Ended(code, signal.SIGINT)
    assert (ended.status, ended.output, ended.errors) == (0, "['new'] SIGINT\n", "")


def test_an_event_loop_keeps_what_it_has() -> None:
    code = """
        import asyncio

        async def main():
            watcher.close()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.append, "loop")
            with InterruptWatcher(told.append):
                ready()
                while not told:
                    await asyncio.sleep(0.02)
            print(told)

        asyncio.run(main())
    """
    ended = Ended(code, signal.SIGTERM)
    assert (ended.status, ended.output, ended.errors) == (0, "['loop']\n", "")


def test_a_signal_for_a_forked_child_is_not_the_parents() -> None:
    code = """
        import warnings
        warnings.simplefilter("ignore")

        def forked():
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                os.write(writer, b"x")
                time.sleep(30)
                os._exit(1)
            os.read(reader, 1)
            os.kill(pid, signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

        ready()
        forked()
        thread = threading.Thread(target=forked)
        thread.start()
        thread.join()
        time.sleep(3.5)
        print(told)
    """
    ended = Ended(code, begin=BEGIN)
    assert (ended.status, ended.output, ended.errors) == (0, "-15\n-15\n[]\n", "")

"""Where an exception may be raised from outside."""

import functools
import sys
import types
from collections.abc import Callable

import pytest

from tf_syncdist.cluster.frames import WhenItGoesOn, innermost_of_program


def module(path: str, name: str) -> types.ModuleType:
    """Returns a module whose `call` calls something and whose `swallow` forgets its errors."""
    code = """
def call(function):
    return function()

def swallow(function):
    try:
        function()
    except BaseException:
        pass
"""
    made = types.ModuleType(name)
    exec(compile(code, path, "exec"), vars(made))
    return made


@pytest.fixture
def library() -> types.ModuleType:
    """Stands for what pip has installed."""
    return module("/venv/lib/python3.11/site-packages/library/core.py", "library.core")


def place() -> types.FrameType:
    """Returns where an exception would be raised, were the caller interrupted now."""
    return innermost_of_program(sys._getframe(1))


def test_a_program_is_interrupted_where_it_is(library: types.ModuleType) -> None:
    assert place() is sys._getframe()
    seen = []

    def called_back() -> None:
        seen.append((place(), sys._getframe()))

    library.call(called_back)
    assert seen[0][0] is seen[0][1]


def test_a_library_is_interrupted_where_it_was_called(library: types.ModuleType) -> None:
    here = sys._getframe()
    assert library.call(lambda: library.call(sys._getframe)) is not here
    found = library.call(sys._getframe)
    assert found.f_code.co_filename.endswith("core.py") and innermost_of_program(found) is here


@pytest.mark.parametrize("name", ["keras.src.trainer", "tf_syncdist.strategies.sites"])
def test_loops_that_last_long_count_as_the_program(name: str) -> None:
    own = module("/venv/lib/python3.11/site-packages/somewhere.py", name)
    found = own.call(sys._getframe)
    assert innermost_of_program(found) is found


def raiser(later: WhenItGoesOn, frame: types.FrameType) -> Callable[[], None]:
    """Returns what interrupts a frame when it is called somewhere else."""

    def act() -> None:
        raise KeyboardInterrupt from None

    return lambda: later.call(frame, act)


def test_an_exception_comes_when_the_frame_goes_on(library: types.ModuleType) -> None:
    before, later, reached = sys.gettrace(), WhenItGoesOn(), []
    with pytest.raises(KeyboardInterrupt):
        library.swallow(raiser(later, sys._getframe()))
        reached.append("the next line")
    assert not reached and sys.gettrace() is before


def test_it_takes_the_place_of_an_error(library: types.ModuleType) -> None:
    later = WhenItGoesOn()

    def fails() -> None:
        raiser(later, frame)()
        raise ValueError("a step was cut short")

    frame = sys._getframe()
    with pytest.raises(KeyboardInterrupt) as info:
        library.call(fails)
    assert info.value.__suppress_context__


def test_it_comes_where_the_frame_ends() -> None:
    later = WhenItGoesOn()

    def last() -> None:
        raiser(later, sys._getframe())()

    with pytest.raises(KeyboardInterrupt):
        last()


def test_the_last_one_counts_and_nothing_stays() -> None:
    before, later, seen = sys.gettrace(), WhenItGoesOn(), []
    frame = sys._getframe()
    own = frame.f_trace

    def ask(*numbers: int) -> None:
        for number in numbers:
            later.call(frame, functools.partial(seen.append, number))

    ask(1, 2)
    assert seen == [2]

    def cancel() -> None:
        ask(3)
        later.cancel()
        later.cancel()

    cancel()
    assert seen == [2] and sys.gettrace() is before and frame.f_trace is own

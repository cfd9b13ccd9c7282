"""Where in a running program an exception may be raised that comes from outside of it.

Python may run a signal's handler within any function. Many functions of libraries are called from
C or C++ that is not prepared for exceptions: what is raised in there may be lost, printed and
forgotten, turned into another error, or crash the process. TensorFlow's are, and so is everything
that is called where an object is destroyed.
"""

import os
import sys
from collections.abc import Callable
from types import FrameType

_INNERMOST_FRAMES = 4
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")

# Keras' loops may last for hours, and so may this package's waits.
_LIKE_PROGRAMS = ("keras", "tf_syncdist")


def innermost_of_program(frame: FrameType | None) -> FrameType | None:
    """Returns the innermost frame that is not a library's, or the given one if all are."""
    found = frame
    while found is not None and _is_library(found):
        found = found.f_back
    return found or frame


def exception_being_made(frame: FrameType | None) -> FrameType | None:
    """Returns the frame of an exception's constructor, if one is running.

    TensorFlow calls it from C++ when a step has failed. What is raised meanwhile is lost: pybind11
    puts a RuntimeError of its own in its place.
    """
    found = None
    for _ in range(_INNERMOST_FRAMES):
        if frame is None:
            break
        if frame.f_code.co_name == "__init__":
            # The outermost one of several classes' is the last one that is found.
            if isinstance(frame.f_locals.get("self"), BaseException):
                found = frame
        frame = frame.f_back
    return found


class WhenItGoesOn:
    """Calls a function as soon as a frame goes on, by the means of a debugger.

    Only one call is outstanding at a time, on the thread that uses this.
    """

    def __init__(self) -> None:
        self._undo: Callable[[], None] | None = None

    def call(self, frame: FrameType, act: Callable[[], None]) -> None:
        """Calls `act` in the place of the frame's next line, or of its end.

        Args:
            frame: A frame of this thread.
            act: It may raise, as if the line had.
        """
        self.cancel()
        before, own = sys.gettrace(), frame.f_trace

        def undo() -> None:
            sys.settrace(before)
            frame.f_trace = own

        def trace(at: FrameType, event: str, argument: object) -> None:
            # Of functions that are called meanwhile nothing more is to be known.
            if at is frame:
                self.cancel()
                act()

        self._undo = undo
        frame.f_trace = trace
        sys.settrace(trace)

    def cancel(self) -> None:
        """Does not call anything any more."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


def _is_library(frame: FrameType) -> bool:
    if frame.f_globals.get("__name__", "").partition(".")[0] in _LIKE_PROGRAMS:
        return False
    path = frame.f_code.co_filename
    installed = any(part in path for part in _INSTALLED)
    return installed or path.startswith((_STANDARD_LIBRARY, "<frozen "))

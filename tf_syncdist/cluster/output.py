"""Turns the bytes that a task writes into lines.

Everything here is about bytes: what a task writes need not be UTF-8, and a launcher that
decodes it would stop a job for the sake of a broken character in a file name.
"""

import re

# A line longer than this is cut, so that a task which never ends one cannot fill the memory.
MAX_LINE_BYTES = 1 << 20

# From here on the history of a line that only moves by backspaces is thrown away.
_COMPACT_BYTES = 1 << 14

_ESCAPE = rb"\x1b\[[0-?]*[ -/]*[@-~]"
_TOKENS = re.compile(_ESCAPE + rb"|[\xc0-\xff][\x80-\xbf]+|.", re.DOTALL)
_ESCAPES = re.compile(_ESCAPE)

# Month and day 00 mark a C++ message from before absl::InitializeLog(), which TensorFlow's Python
# package never calls. A script that logs with absl's Python module writes a real date, and stays.
_STARTUP_CHATTER = re.compile(
    rb"I0000 00:00:\d+\.\d+\s+\d+ [^\s:]+:\d+\]"
    rb"|E0000 00:00:\d+\.\d+\s+\d+ cuda_platform\.cc:\d+\] failed call to cuInit:"
    rb"|WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
)


def is_startup_chatter(line: bytes) -> bool:
    """Says whether a line of stderr is TensorFlow's C++ start-up chatter.

    Only messages of severity I, the sentence that announces them, and what a machine without GPU
    answers to the search for one count; other warnings and errors never do.

    Args:
        line: A line without its newline.

    Returns:
        Whether the line can be dropped without losing anything.
    """
    return _STARTUP_CHATTER.match(line) is not None


def last_state(line: bytes) -> bytes:
    """Returns what a line showed last, after carriage returns and backspaces.

    This is not a terminal: what follows a carriage return replaces the line, even where it is
    shorter than what it overwrites.

    Args:
        line: A line without its newline.

    Returns:
        The last state of the line that shows anything.
    """
    states = line.split(b"\r")
    state = next((s for s in reversed(states) if _is_visible(s)), states[-1]).rstrip(b"\b")
    if b"\b" not in state:
        return state
    kept: list[bytes] = []
    for token in _TOKENS.findall(state):
        if token != b"\b":
            kept.append(token)
            continue
        while kept and kept.pop().startswith(b"\x1b"):
            pass
    return b"".join(kept)


def fit(line: bytes, width: int) -> bytes:
    """Cuts a line to a number of columns, leaving escape sequences whole.

    Args:
        line: A line without its newline.
        width: The number of columns; every character counts as one.

    Returns:
        The line, ended with a reset of all colours if it contained any.
    """
    kept: list[bytes] = []
    columns = 0
    for token in _TOKENS.findall(line):
        if not token.startswith(b"\x1b"):
            if columns == width:
                break
            columns += 1
        kept.append(token)
    return b"".join(kept) + (b"\x1b[0m" if b"\x1b" in line else b"")


def _is_visible(state: bytes) -> bool:
    return bool(_ESCAPES.sub(b"", state).strip(b" \b"))


class LineBuffer:
    """Collects the bytes of one stream and gives back whole lines.

    A progress bar counts as one line, of which only the last state is given back.

    Example:

    >>> buffer = LineBuffer()
    >>> buffer.feed(b"hello\\n 10%\\r 50%")
    [b'hello']
    >>> buffer.partial
    b' 50%'
    >>> buffer.feed(b"\\r100%\\n")
    [b'100%']
    """

    def __init__(self) -> None:
        self._pending = b""

    @property
    def partial(self) -> bytes:
        """What the line that has not ended yet shows now."""
        return last_state(self._pending)

    def feed(self, data: bytes) -> list[bytes]:
        """Takes in bytes as they were read.

        Args:
            data: Any number of bytes, cut anywhere.

        Returns:
            The lines that are complete now, without their newlines.
        """
        *ended, rest = (self._pending + data).split(b"\n")
        lines = [last_state(line) for line in ended]
        self._pending = self._compact(rest)
        while len(self._pending) > MAX_LINE_BYTES:
            lines.append(last_state(self._pending[:MAX_LINE_BYTES]))
            self._pending = self._pending[MAX_LINE_BYTES:]
        return lines

    def finish(self) -> list[bytes]:
        """Gives back a last line that has no newline.

        Returns:
            That line, or nothing if the last line was complete.
        """
        state, self._pending = last_state(self._pending), b""
        return [state] if state else []

    @staticmethod
    def _compact(pending: bytes) -> bytes:
        """Forgets the states of a line that can no longer become its last one."""
        if b"\r" in pending:
            states = pending.split(b"\r")
            if _is_visible(states[-1]):
                pending = states[-1]
            else:
                shown = next((s for s in reversed(states) if _is_visible(s)), b"")
                pending = shown + b"\r" + states[-1]
        # Backspaces at the end only move the cursor: what they stand on is gone when text follows.
        body = pending.rstrip(b"\b")
        if len(body) > _COMPACT_BYTES and b"\b" in body and b"\r" not in body:
            pending = last_state(body) + pending[len(body) :]
        return pending

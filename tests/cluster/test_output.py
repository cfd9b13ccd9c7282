"""What the launcher makes of the bytes that a task writes."""

import pytest

from tf_syncdist.cluster import output

KERAS_BAR = "\x1b[1m{0}/3\x1b[0m \x1b[32m━━━━\x1b[0m 1s/step"


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (b"plain", b"plain"),
        (b"", b""),
        (b"windows\r", b"windows"),
        (b"\r 10%\r 50%\r100%", b"100%"),
        (b" 10%\r100%\r", b"100%"),
        (b"bar\r          \rdone", b"done"),
        (b"12%\b\b\b13%", b"13%"),
        ("━━\b\b━━━".encode(), "━━━".encode()),
        (b"\x1b[1mab\x1b[0m\b\bcd", b"\x1b[1mcd"),
        (b"typed\b\b", b"typed"),
        (b"\b\b\b\rbar\b\b\b", b"bar"),
    ],
)
def test_last_state(line: bytes, want: bytes) -> None:
    assert output.last_state(line) == want


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_a_keras_progress_bar_becomes_its_last_state_however_it_is_cut(step: int) -> None:
    bars = [KERAS_BAR.format(i) for i in (1, 2, 3)]
    data = ("Epoch 1/1\n\r" + bars[0]).encode()
    for bar in bars[1:]:
        data += ("\b" * 15 + "\r" + bar).encode()
    data += b"\nafter\n"

    buffer = output.LineBuffer()
    lines = [line for i in range(0, len(data), step) for line in buffer.feed(data[i : i + step])]

    assert lines == [b"Epoch 1/1", bars[2].encode(), b"after"]
    assert buffer.finish() == []


@pytest.mark.parametrize("separator", [b"\r", b"\b" * 9])
def test_a_bar_that_never_ends_does_not_fill_the_memory(separator: bytes) -> None:
    buffer = output.LineBuffer()
    for i in range(20_000):
        assert buffer.feed(b"step %04d" % (i % 10_000) + separator) == []
    assert len(buffer._pending) < 20_000
    assert buffer.finish() == [b"step 9999"]


def test_a_line_that_never_ends_is_cut() -> None:
    buffer = output.LineBuffer()
    lines = [line for _ in range(40) for line in buffer.feed(b"x" * (1 << 16))]
    assert len(lines) == 2
    assert sum(map(len, lines + buffer.finish())) == 40 << 16


def test_finish_gives_back_a_line_without_newline() -> None:
    buffer = output.LineBuffer()
    assert buffer.feed(b"one\ntwo") == [b"one"]
    assert buffer.partial == b"two"
    assert buffer.finish() == [b"two"]
    assert buffer.finish() == []


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (b"I0000 00:00:1795168143.549221    2800 port.cc:153] oneDNN custom operations", True),
        (
            b"WARNING: All log messages before absl::InitializeLog() is called are written to"
            b" STDERR",
            True,
        ),
        (b"W0000 00:00:1795168143.549221    2800 port.cc:153] careful", False),
        (b"E0000 00:00:1795168143.549221    2800 port.cc:153] cannot", False),
        (b"F0000 00:00:1795168143.549221    2800 port.cc:153] dead", False),
        (b"I0718 12:01:02.549221 139 train.py:33] logged by the script with absl", False),
        (b"WARNING: something else", False),
        (b"", False),
    ],
)
def test_startup_chatter(line: bytes, want: bool) -> None:
    assert output.is_startup_chatter(line) is want


@pytest.mark.parametrize(
    ("line", "width", "want"),
    [
        (b"abcdef", 3, b"abc"),
        (b"ab", 3, b"ab"),
        ("━━━".encode(), 2, "━━".encode()),
        (b"\x1b[1mabc\x1b[0m", 2, b"\x1b[1mab\x1b[0m"),
    ],
)
def test_fit(line: bytes, width: int, want: bytes) -> None:
    assert output.fit(line, width) == want

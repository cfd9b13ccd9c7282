"""What this machine allows: the limits that benchmarks.allreduce compares with.

Nothing here is an all-reduce that could be used. Each limit does only what an exchange of that
kind cannot do without, with as little Python as possible, in processes of their own:

* memcpy-limit. Each of N worker processes copies its values from a buffer of its own into one that
  it shares with a summing process (one numpy copy). When the summing process has been told so by
  all of them, it adds the N shared buffers into a further shared one, block by block. When it has
  told the workers, each copies the sums into a buffer of its own (one numpy copy). All buffers
  exist and have been written before; telling is one byte in a pipe. The three phases do not
  overlap: an implementation that does a part of one while another is running can be faster.
* socket-limit. Each of N worker processes sends its bytes through a TCP connection over loopback to
  one aggregating process and receives as many, at the same time, in a thread for each direction.
  The aggregating process has a thread per connection that sends back what comes, and holds
  back the last piece until all bytes of all workers are there, as the sum of the last ones would
  have to. It does not add. It sends while it receives, which a sum can do only for the
  part that has come from everybody. This is the limit of a star, in which 2 N times the bytes
  travel; in a ring it is 2 (N - 1) times, which for two workers is half of it.

The time is that of a worker, from its first copied or sent byte to its last.
"""

from __future__ import annotations

import mmap
import multiprocessing
import multiprocessing.connection
import os
import queue
import socket
import threading
from collections.abc import Callable

import numpy as np
from absl import flags

from benchmarks import allreduce_child as child
from benchmarks import tensors

_SYSTEM = flags.DEFINE_enum(
    "system", "memcpy-limit", ["memcpy-limit", "socket-limit"], "Which limit."
)
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 2, "Worker processes.")

# Small enough for all blocks of a sum to stay in the cache of a core.
_SUM_BLOCK = 2**15
_SOCKET_BLOCK_BYTES = 2**20


def _shared(elements: int, dtype: type = np.float32) -> np.ndarray:
    """Returns a written array that processes forked from this one share."""
    array = np.frombuffer(mmap.mmap(-1, elements * np.dtype(dtype).itemsize), dtype)
    array.fill(0)
    return array


class _MemcpyLimit:
    """The shared buffers and pipes of the memcpy-limit."""

    def __init__(self, workers: int, elements: int) -> None:
        self._inputs = [_shared(elements) for _ in range(workers)]
        self._sums = _shared(elements)
        self._told, self._tell = os.pipe()
        self._answers = [os.pipe() for _ in range(workers)]

    def serve(self) -> None:
        """Adds up for all rounds."""
        first, *others = self._inputs
        for _ in range(_total_rounds()):
            missing = len(self._inputs)
            while missing:
                missing -= len(os.read(self._told, missing))
            for start in range(0, self._sums.size, _SUM_BLOCK):
                block = slice(start, start + _SUM_BLOCK)
                np.add(first[block], others[0][block], out=self._sums[block])
                for other in others[1:]:
                    np.add(self._sums[block], other[block], out=self._sums[block])
            for _, answer in self._answers:
                os.write(answer, b"1")

    def work(self, worker: int) -> child.Result:
        """Copies in and out for all rounds."""
        own = np.ones(self._sums.size, np.float32)
        received = np.zeros_like(own)
        answered = self._answers[worker][0]

        def exchange(_: int) -> None:
            np.copyto(self._inputs[worker], own)
            os.write(self._tell, b"1")
            os.read(answered, 1)
            np.copyto(received, self._sums)

        result = child.time_rounds(exchange)
        assert np.all(received == len(self._inputs))
        return result


class _SocketLimit:
    """The listening socket of the socket-limit."""

    def __init__(self, workers: int, elements: int) -> None:
        self._workers = workers
        self._bytes = elements * 4
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=workers)

    def serve(self) -> None:
        """Returns what comes, in one thread per worker."""
        all_here = threading.Barrier(self._workers)
        threads = []
        for _ in range(self._workers):
            connection, _ = self._listener.accept()
            threads.append(threading.Thread(target=self._echo, args=(connection, all_here)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _echo(self, connection: socket.socket, all_here: threading.Barrier) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(_SOCKET_BLOCK_BYTES))
        for _ in range(_total_rounds()):
            left = self._bytes
            while left:
                count = connection.recv_into(buffer, min(left, len(buffer)))
                if not count:
                    raise ConnectionError("A worker has left before the last round.")
                left -= count
                if not left:
                    all_here.wait()
                connection.sendall(buffer[:count])

    def work(self, worker: int) -> child.Result:
        """Sends and receives for all rounds."""
        connection = socket.create_connection(self._listener.getsockname())
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own = memoryview(np.full(self._bytes, worker, np.uint8))
        received = np.full(self._bytes, 255, np.uint8)
        rounds: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def send() -> None:
            while rounds.get():
                connection.sendall(own)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()

        def exchange(_: int) -> None:
            rounds.put(True)
            count = connection.recv_into(received, self._bytes, socket.MSG_WAITALL)
            if count != self._bytes:
                raise ConnectionError(f"Expected {self._bytes} bytes back, got {count}.")

        result = child.time_rounds(exchange)
        rounds.put(False)
        assert np.all(received == worker)
        return result


def _total_rounds() -> int:
    """Returns how many rounds there are, those before the measured ones included."""
    return child.WARMUP_ROUNDS.value + child.ROUNDS.value


def _run_together(programs: list[Callable[[], None]]) -> None:
    """Runs each program in a forked process of its own until all have ended well."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=program, daemon=True) for program in programs]
    for process in processes:
        process.start()
    child.limit_time()
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                # The others, which may wait for it for ever, end with this process.
                raise RuntimeError(f"Expected exit code 0, got {process.exitcode} of {process}.")


def _measure() -> child.Result:
    """Runs the processes of the limit and returns the seconds of all workers."""
    workers, elements = _NUM_WORKERS.value, tensors.total_elements(child.shapes())
    kind = _MemcpyLimit if _SYSTEM.value == "memcpy-limit" else _SocketLimit
    limit = kind(workers, elements)
    times = [_shared(child.ROUNDS.value, np.float64) for _ in range(workers)]

    def work(worker: int) -> None:
        child.limit_time()
        times[worker][:] = limit.work(worker)["seconds"]

    def serve() -> None:
        child.limit_time()
        limit.serve()

    _run_together([serve, *(lambda worker=worker: work(worker) for worker in range(workers))])
    return {"seconds": [float(value) for own in times for value in own]}


if __name__ == "__main__":
    child.run(_measure, forks=True)

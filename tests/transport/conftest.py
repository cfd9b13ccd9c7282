"""A real service on free ports of this machine, and sessions and programs that use it."""

import concurrent.futures
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tf_syncdist import cutoff
from tf_syncdist.aggregation import membership
from tf_syncdist.aggregation.limits import DEFAULT_LIMITS, Limits
from tf_syncdist.aggregation.server import AggregatorServer
from tf_syncdist.propagation.policies import FifoPropagation, cutter
from tf_syncdist.propagation.slices import TensorSpec
from tf_syncdist.strategies.controller import Mode, RunController
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials
from tf_syncdist.transport.session import Session, SessionConfig

# Nothing here is to fail because the machine is slow: these bound what is expected to succeed.
_DEADLINE_SECONDS = 60.0
_CONNECT_SECONDS = 30.0
_PATIENCE_SECONDS = 30.0
_DETECTION = "detection_seconds"
SHAPE = (3, 5)


class Site:
    """A place in a program, with the variables that it trains."""

    def __init__(self, names: tuple[str, ...], replayable: bool) -> None:
        self.names = names
        self.replayable = replayable
        self.unlike_replay = "" if replayable else "of the test"
        self.synchronised = False
        self.outputs: list[np.ndarray] | None = None


class Store:
    """Variables in memory; each worker begins with other values."""

    def __init__(self, worker: int, shape: tuple[int, ...] = SHAPE) -> None:
        rng = np.random.default_rng(worker)
        self.values = {n: rng.normal(size=shape).astype("f4") for n in ("a", "b")}
        self._common: list[str] = []
        self._new: list[str] = []

    def unsynchronised(self, site: Site) -> list[tuple]:
        self._new = [n for n in site.names if n not in self._common]
        return self._specs(self._new)

    def read_new(self) -> list[np.ndarray]:
        return [self.values[n] for n in self._new]

    def assign_new(self, values: Sequence[np.ndarray]) -> None:
        self.values.update(zip(self._new, values, strict=True))

    def commit(self) -> None:
        self._common += self._new

    def specs(self) -> list[tuple]:
        return self._specs(self._common)

    def read(self) -> list[np.ndarray]:
        return [self.values[n] for n in self._common]

    def assign(self, values: Sequence[np.ndarray]) -> None:
        self.values.update(zip(self._common, values, strict=True))

    def _specs(self, names: Sequence[str]) -> list[tuple]:
        return [(n, "float32", self.values[n].shape) for n in names]


class Worker:
    """A program that trains by gradient descent: the gradient depends on the worker and the run."""

    def __init__(self, session: Session, shape: tuple[int, ...] = SHAPE) -> None:
        self.notices: list[str] = []
        self.begun = 0
        self.modes: list[Mode] = []
        self.store = Store(session.config.worker, shape)
        self.session = session
        cut = cutter(
            FifoPropagation(), 24, len(session.config.addresses), session.config.num_workers
        )
        self.controller = RunController(
            session, self.store, cut, self._on_begin, self.notices.append
        )

    def do_run(
        self, site: Site, compute: Callable[[], object] = lambda: None, exchanges: int = 1
    ) -> None:
        """Does one run, as the graph would; `compute` is called where gradients are computed."""
        mode = self.controller.begin(site)
        self.modes.append(mode)
        if mode is Mode.COMPUTE:
            compute()
            for number in range(exchanges):
                seed = (self.session.config.worker, self.controller.run, number)
                mine = [np.random.default_rng(seed).normal(size=SHAPE).astype("f4")]
                self._apply(site, self.controller.exchange(mine * len(site.names)))
            self.controller.finish(site, [np.array(self.controller.run)])
        else:
            for _ in range(exchanges if mode is Mode.REPLAY else 0):
                specs = [TensorSpec("float32", SHAPE)] * len(site.names)
                self._apply(site, self.controller.stored(self.controller.plan(specs)))
            self.controller.finish(site, None)

    def do_runs(self, site: Site, count: int) -> None:
        """Does some runs."""
        for _ in range(count):
            self.do_run(site)

    def site(self, *names: str, replayable: bool = True) -> Site:
        """Returns a new place in the program that trains some variables, or "a"."""
        return Site(names or ("a",), replayable)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """How often it contributed, was late, replayed, and missed a round."""
        report = self.controller.report()
        assert report.rounds == report.contributed + report.late + report.replayed
        return report.contributed, report.late, report.replayed, report.missed

    @property
    def reported(self) -> tuple[int, int, int, int]:
        """The same as the service has counted it."""
        report = self.session.report().workers[self.session.config.worker]
        return report.contributed, report.late, report.replayed, report.missed

    @property
    def bytes(self) -> bytes:
        """The common variables."""
        return b"".join(v.tobytes() for v in self.store.read())

    def answer(self, stop: threading.Event) -> None:
        """Does what a program does that is done and waits for the others."""
        while not stop.wait(0.01) and not self.session.has_failed:
            self.controller.answer_state_requests()

    def _on_begin(self) -> None:
        self.begun += 1

    def _apply(self, site: Site, results: list[np.ndarray]) -> None:
        for name, result in zip(site.names, results, strict=True):
            self.store.values[name] = self.store.values[name] - np.float32(0.1) * result


class Service:
    """All shards of a job's service, and the sessions that a test opens.

    Args:
        num_workers: How many workers the job has.
        b: Number of backup workers.
        shards: Number of shards.
        credentials: What the shards demand.
        limits: What they allow.
        record_trace: Where the first one records how long workers take.
        **config: Changes of `SessionConfig` for all workers.
    """

    def __init__(
        self,
        num_workers: int,
        b: int = 0,
        shards: int = 1,
        credentials: Credentials = NO_CREDENTIALS,
        limits: Limits = DEFAULT_LIMITS,
        record_trace: str = "",
        **config: Any,
    ) -> None:
        self.events: list[str] = []
        self.restarts = 0
        # Held for a shard that is started again, and for what looks for one that is gone.
        self._ports = [_reserve_port() for _ in range(shards)]
        self.servers = [
            AggregatorServer(
                port=reserved.getsockname()[1],
                credentials=credentials,
                on_event=self.events.append,
                limits=limits,
                record_trace=record_trace,
            )
            for reserved in self._ports
        ]
        self.notices: list[list[str]] = [[] for _ in range(num_workers)]
        self._sessions: list[Session] = []
        self.config = SessionConfig(
            addresses=tuple(f"127.0.0.1:{s.port}" for s in self.servers),
            worker=0,
            num_workers=num_workers,
            cutoff=cutoff.serialize(cutoff.BackupWorkers(b)),
            connect_timeout_seconds=_CONNECT_SECONDS,
            timeout_seconds=_DEADLINE_SECONDS,
        )._replace(**config)

    def session(self, worker: int, **changes: Any) -> Session:
        """Opens the session of a worker, perhaps with a config unlike that of the others."""
        config = self.config._replace(worker=worker, **changes)
        session = Session(config, lambda text: self.notices[worker].append(text))
        self._sessions.append(session)
        return session

    def sessions(self) -> list[Session]:
        """Opens the sessions of all workers."""
        return [self.session(worker) for worker in range(self.config.num_workers)]

    def worker(self, worker: int, **changes: Any) -> Worker:
        """Starts the program of a worker."""
        return Worker(self.session(worker, **changes))

    def workers(self) -> list[Worker]:
        """Starts the programs of all workers."""
        return [Worker(session) for session in self.sessions()]

    def be_impatient(self, **changes: float) -> None:
        """Lets all sessions wait otherwise from now on, with all that they needed behind them."""
        for session in self._sessions:
            session.config = session.config._replace(**changes)

    def restart(self, shard: int) -> None:
        """Ends a shard and starts another one in its place, which knows nothing."""
        port = self.servers[shard].port
        self.servers[shard].close(grace_seconds=0)
        self.servers[shard] = AggregatorServer(port=port, on_event=self.events.append)
        self.restarts += 1

    def keep_restarting(self, stop: threading.Event, seed: int, times: int = 6) -> None:
        """Restarts some shard again and again, until that was often enough or `stop` is set."""
        rng = np.random.default_rng(seed)
        for _ in range(times):
            if stop.wait(rng.uniform(0.1, 0.4)):
                return
            self.restart(int(rng.integers(len(self.servers))))

    def close(self) -> None:
        """Closes everything; may be called twice."""
        if self._sessions:
            self.together(*(session.close for session in self._sessions))
        for server in self.servers:
            server.close(grace_seconds=0)
        for reserved in self._ports:
            reserved.close()

    @staticmethod
    def together(*functions: Callable[[], Any]) -> list[Any]:
        """Calls functions in threads of their own; returns what they return, or raises."""
        pool = concurrent.futures.ThreadPoolExecutor(len(functions))
        try:
            futures = [pool.submit(f) for f in functions]
            done, _ = concurrent.futures.wait(
                futures, _DEADLINE_SECONDS, concurrent.futures.FIRST_EXCEPTION
            )
            for future in done:
                future.result(0)
            return [future.result(_DEADLINE_SECONDS) for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def until(there: Callable[[], Any], seconds: float = 30.0) -> Any:
        """Waits until a function returns something true, and returns that."""
        deadline = time.monotonic() + seconds
        while not (value := there()):
            assert time.monotonic() < deadline, "what was waited for has not come"
            time.sleep(0.005)
        return value


def _reserve_port() -> socket.socket:
    """Keeps a port from everybody but a server that is told to use it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


@pytest.fixture
def heard_of(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Workers that are heard of all the time, whatever the machine keeps from its turn."""
    workers: set[int] = set()
    tick = membership.Members.tick

    def hear_and_tick(members: membership.Members, now: float) -> membership.Changes:
        for worker in workers:
            members.hear(worker, now)
        return tick(members, now)

    monkeypatch.setattr(membership.Members, "tick", hear_and_tick)
    return workers


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    """Starts services; see `Service`."""
    started: list[Service] = []
    patience = membership.Members.patience_seconds

    def be_patient(members: membership.Members) -> float:
        # Where rounds are fast, a worker would be silent after a second already.
        is_default = members._detection_seconds == SessionConfig._field_defaults[_DETECTION]
        return _PATIENCE_SECONDS if is_default else patience(members)

    monkeypatch.setattr(membership.Members, "patience_seconds", be_patient)

    def start(*args: Any, **kwargs: Any) -> Service:
        started.append(Service(*args, **kwargs))
        return started[-1]

    yield start
    for service in started:
        service.close()

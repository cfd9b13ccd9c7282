"""How a strategy takes part in its job, and what it tells of it: who is there, and how it went."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_syncdist.cluster.roles import ClusterRole
from tf_syncdist.observability.reports import Report
from tf_syncdist.strategies import adapter
from tf_syncdist.strategies.controller import LocalReport, RunController
from tf_syncdist.strategies.epochs import EpochExchange
from tf_syncdist.strategies.lifetime import Membership, say
from tf_syncdist.strategies.runs import Runs
from tf_syncdist.strategies.seeds import Seeds
from tf_syncdist.strategies.site import Site
from tf_syncdist.strategies.state import CommonState, optimizer_variables
from tf_syncdist.strategies.stopping import Stopping
from tf_syncdist.strategies.variables import VariableRegistry


class JobSide:
    """The part of a strategy that is about its job."""

    _aggregate: int
    _cluster_resolver_given: tf.distribute.cluster_resolver.ClusterResolver | None
    _controller: RunController
    _epochs: EpochExchange
    _member: Membership | None
    _registry: VariableRegistry
    _role: ClusterRole
    _runs: Runs
    _seeds: Seeds
    _stopping: Stopping

    def _take_part(self, state: CommonState, cut: Callable, **options: Any) -> None:
        """Begins this worker's part in a job of several workers.

        Args:
            state: The variables that workers hold alike.
            cut: See `RunController`, as for the options.
            options: How runs are done.
        """
        session = self._member.session
        self._controller = RunController(session, state, cut, self._before_run, say, **options)
        self._epochs = EpochExchange(
            session,
            state,
            lambda: self._controller.runs_done,
            self._controller.mend,
            lambda: self._controller.is_ahead,
            self._controller.settle,
        )
        self._seeds = Seeds(self._registry, self.worker_index)
        self._stopping = Stopping(session, lambda: self._controller.run)
        self._runs.controller = self._controller
        self._member.attach(self._controller)
        self._has_common_seed = not adapter.global_seed_is_set()
        self._set_common_seed()

    def _set_common_seed(self) -> None:
        # Workers divide a dataset by position, so they must shuffle it alike.
        self._common_seed = self._member.session.job_seed
        if self._has_common_seed:
            tf.random.set_seed(self._common_seed)

    def _before_run(self) -> None:
        self._epochs.forget_sums()
        self._stopping.before_run()

    def _on_traced(self, site: Site) -> None:
        for optimizer, _ in site.updates:
            for variable in optimizer.variables:
                self._registry.check(variable.value, variable.path)
        used = self._registry.containers(site.variables)
        written = used if site.written is None else self._registry.containers(site.written)
        self._epochs.add(used, written, self._owned(site))
        self._seeds.fold(site.variables or ())

    def _owned(self, site: Site) -> list[tf.Variable]:
        """Returns variables that are no statistics although training writes them."""
        return optimizer_variables(site)

    @property
    def num_replicas_in_sync(self) -> int:
        """N x devices: over how many replicas the loss of an update is averaged."""
        return self._aggregate * len(self.extended.worker_devices)

    @property
    def num_replicas_in_job(self) -> int:
        """How many replicas the job has, those of backup workers included."""
        return self.num_workers * len(self.extended.worker_devices)

    @property
    def is_open(self) -> bool:
        """Whether this worker takes part in a job of several workers."""
        return self._member is not None and not self._member.is_closed

    @property
    def num_workers(self) -> int:
        """N + b: how many workers the job has."""
        return self._role.num_workers

    @property
    def worker_index(self) -> int:
        """Index of this worker."""
        return self._role.task_index

    @property
    def is_chief(self) -> bool:
        """Whether this is worker 0, the one that should write files."""
        return self._role.task_index == 0

    @property
    def cluster_resolver(self) -> tf.distribute.cluster_resolver.ClusterResolver | None:
        """The cluster resolver that was given."""
        return self._cluster_resolver_given

    @property
    def resume_run(self) -> int:
        """The run with which this worker is to begin; not 0 if it comes back to a job.

        A custom loop counts its steps from here. Read it before the first step: it waits until all
        workers have come, and this worker's runs count from it.
        """
        if self._member is None:
            return 0
        started = self._member.session.wait_started()
        if not started.in_progress:
            return 0
        self._controller.start_at(started.run)
        return started.run

    def report(self) -> Report:
        """Returns the counts of the job so far; printed, it is a few plain lines.

        Returns:
            A `tf_syncdist.observability.reports.Report`.
        """
        if self._member is None:
            return Report(self._runs.counted_alone()[0], ())
        self._controller.settle()
        return self._member.report()

    def local_report(self) -> LocalReport:
        """Returns this worker's own counts, without asking anybody."""
        if self._member is None:
            rounds, seconds = self._runs.counted_alone()
            return LocalReport(0, 1, rounds, rounds, 0, 0, 0, seconds)
        self._controller.settle()
        return self._controller.report()

    def close(self) -> None:
        """Leaves the job; done by itself when the program ends. May be called twice."""
        if self._member is not None:
            self._member.close()

    @property
    def limit_gbps(self) -> float:
        """How many gigabits per second may pass in each direction; 0 for no limit."""
        return 0.0 if self._member is None else self._member.session.limit_gbps

    @limit_gbps.setter
    def limit_gbps(self, gbps: float) -> None:
        if self._member is not None:
            self._member.session.limit(gbps)

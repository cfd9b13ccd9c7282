"""The counters of a job as they go to the wire."""

from tf_syncdist.aggregation.rounds import Fate, Rounds
from tf_syncdist.proto import tf_syncdist_pb2 as pb


def reply(rounds: Rounds) -> pb.ReportReply:
    """Returns what the rounds have counted so far."""
    return pb.ReportReply(
        rounds=rounds.rounds,
        workers=[
            pb.WorkerReport(
                worker=index,
                contributed=counts.fates[Fate.CONTRIBUTED],
                late=counts.fates[Fate.LATE],
                partly_used=counts.partly_used,
                replayed=counts.replayed,
                missed=counts.fates[Fate.MISSED],
                mean_delay_seconds=counts.mean_delay_seconds,
                delays=counts.delays,
                nonfinite=counts.nonfinite,
            )
            for index, counts in enumerate(rounds.counts)
        ],
    )

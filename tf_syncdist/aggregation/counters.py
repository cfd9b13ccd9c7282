"""The counters of a job as they go to the wire."""

from tf_syncdist.aggregation.rounds import Fate, Rounds
from tf_syncdist.proto import tf_syncdist_pb2 as pb


def reply(rounds: Rounds, cutoff: pb.CutoffReport | None = None) -> pb.ReportReply:
    """Returns what the rounds have counted so far.

    Args:
        rounds: The rounds.
        cutoff: What the cutoff policy has chosen, if it chooses.
    """
    return pb.ReportReply(
        rounds=rounds.rounds,
        cutoff=cutoff,
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

"""Tells what a cutoff would give, without a cluster.

    python -m tf_syncdist.simulate --workers=100 --law=chen2016 --cutoff=backup:4 --sweep
    python -m tf_syncdist.simulate --trace=trace.npz --plot=cutoffs.png

The rounds and cutoffs are those of the service; run-times are drawn from a law or are those of a
trace that a job with `record_trace` has written.
"""

import sys

from absl import app, flags

from tf_syncdist.simulation import console, laws, names

_WORKERS = flags.DEFINE_integer("workers", None, "How many workers; 100 if there is no trace.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", None, "How many rounds. Default: 1,000, or all of the trace.", lower_bound=1
)
_LAW = flags.DEFINE_string(
    "law",
    None,
    f"How long workers take: {', '.join(laws.NAMES)}, or trace. A value may follow, such as "
    "lognormal:0.3 or regime_switching:2.5. Default: trace if there is one, else chen2016.",
)
_NODES = flags.DEFINE_integer("nodes", None, "On how many nodes workers are, for regime_switching.")
_TRACE = flags.DEFINE_string("trace", None, "A file with recorded run-times.")
_CUTOFF = flags.DEFINE_list(
    "cutoff",
    None,
    f"One or more of {names.FORMS}. Default: backup:4; with a trace full, backup:1, backup:2, "
    "learned.",
)
_SWEEP = flags.DEFINE_boolean("sweep", False, "Whether to show what every b would give.")
_STAY_BUSY = flags.DEFINE_boolean(
    "late_workers_stay_busy",
    False,
    "Whether late workers compute on to the end, as real ones do, instead of beginning the next "
    "round with the others.",
)
_FIRST_ROUND = flags.DEFINE_integer(
    "first_round",
    None,
    "From which round on is measured. Default: 0; half of the rounds, 500 at most, if learned has "
    "to be trained.",
    lower_bound=0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the run-times.", lower_bound=0)
_PLOT = flags.DEFINE_string("plot", None, "File for a figure; takes the extra `plot`.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for everything, drops per worker included.")


def main(argv: list[str]) -> None:
    """Simulates what the flags describe."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}.")
    try:
        console.run(
            console.Arguments(
                workers=_WORKERS.value,
                rounds=_ROUNDS.value,
                law=_LAW.value,
                nodes=_NODES.value,
                trace=_TRACE.value,
                cutoffs=_CUTOFF.value,
                sweep=_SWEEP.value,
                late_workers_stay_busy=_STAY_BUSY.value,
                first_round=_FIRST_ROUND.value,
                seed=_SEED.value,
                plot=_PLOT.value,
                json_out=_JSON_OUT.value,
            )
        )
    except (ValueError, OSError) as e:
        sys.exit(f"tf_syncdist.simulate: {e}")


if __name__ == "__main__":
    app.run(main)

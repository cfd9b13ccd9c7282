"""Learns the run-times of a job's workers from a trace, for `LearnedCutoff`.

    python -m tf_syncdist.train_cutoff --trace=trace.npz --output=model.npz

The trace is what a job with `--record_trace=trace.npz` has written. It takes a minute or two.
"""

import sys
from pathlib import Path

from absl import app, flags

from tf_syncdist.cutoff import models, traces

_TRACE = flags.DEFINE_string("trace", None, "File with the trace to learn from.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "File that the model is written to.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the training.", lower_bound=0)
_STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "How many updates the network gets. Default: 2,500; with more than 500 workers 1,500. Raise it "
    "if the curve at the end still climbs.",
    lower_bound=1,
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}.")
    output = Path(_OUTPUT.value)
    if not output.absolute().parent.is_dir():
        sys.exit(f"Expected --output in a directory that exists. Received: --output={output}.")
    try:
        trace = traces.load(_TRACE.value)
        # TensorFlow takes a while; a wrong file is told of before.
        from tf_syncdist.cutoff_training import display, training

        print(f"{trace.num_rounds} rounds of {trace.num_workers} workers", flush=True)
        shown = display.Display(sys.stdout)
        model = training.train(trace, seed=_SEED.value, steps=_STEPS.value, on_progress=shown)
        models.save(output, model)
    except (ValueError, OSError) as e:
        sys.exit(f"tf_syncdist.train_cutoff: {e}")
    print(display.curve(shown.history))
    print(display.comparison(model.evaluation))
    print(f"The model is in {output}: use cutoff=LearnedCutoff.load({str(output)!r}).")


if __name__ == "__main__":
    app.run(main)

"""What somebody who trains a model sees: a bar, a curve and a comparison."""

from collections.abc import Sequence
from typing import TextIO

from tf_syncdist.cutoff.models import Evaluation
from tf_syncdist.cutoff_training.training import Progress

_BAR = 30
_CURVE_LINES = 10


class Display:
    """Shows a training while it goes on; call it with each `Progress`.

    Args:
        stream: Where to. A terminal gets a bar that moves, anything else a line now and then.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._moves = stream.isatty()
        self._tenths = 0
        self.history: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        """Shows how far the training is."""
        self.history.append(progress)
        done = progress.step / progress.steps
        if not self._moves and int(10 * done) == self._tenths:
            return
        self._tenths = int(10 * done)
        filled = round(_BAR * done)
        best = max(p.bound for p in self.history)
        text = (
            f"[{'#' * filled}{'.' * (_BAR - filled)}] step {progress.step} of {progress.steps}, "
            f"held-out ELBO {progress.bound:.4f}, best {best:.4f}"
        )
        is_last = progress.step == progress.steps
        end = "\n" if is_last or not self._moves else ""
        print(f"\r\x1b[K{text}" if self._moves else text, end=end, file=self._stream, flush=True)


def curve(history: Sequence[Progress]) -> str:
    """Returns the held-out evidence lower bound over the training as a diagram of a few lines."""
    last = len(history) - 1
    picked = sorted({round(i * last / (_CURVE_LINES - 1)) for i in range(_CURVE_LINES)})
    bounds = [history[i].bound for i in picked]
    low, span = min(bounds), max(max(bounds) - min(bounds), 1e-9)
    lines = ["held-out ELBO, nats per worker and round:"]
    for i, bound in zip(picked, bounds, strict=True):
        length = 1 + round((_BAR - 1) * (bound - low) / span)
        lines.append(f"  step {history[i].step:5d} {bound:10.4f} {'#' * length}")
    kept = max(history, key=lambda progress: progress.bound)
    lines.append(f"  the network of step {kept.step} is kept, with {kept.bound:.4f}")
    return "\n".join(lines)


def comparison(evaluation: Evaluation) -> str:
    """Returns a table of what cutoffs give on the rounds that were held out."""
    rows = [
        ("full sync", evaluation.full_sync),
        (f"best fixed cutoff, {evaluation.best_count} (in hindsight)", evaluation.best_static),
        ("learned cutoff", evaluation.learned),
        ("oracle, which sees the times", evaluation.oracle),
    ]
    lines = [f"{'on held-out rounds':36} contributions/s   of the oracle"]
    for name, throughput in rows:
        lines.append(f"  {name:34} {throughput:15.4g} {throughput / evaluation.oracle:14.1%}")
    if evaluation.learned <= evaluation.best_static:
        lines.append(
            "The model is no better than the best fixed cutoff here. If the workers are alike, "
            "nothing is; else record more rounds."
        )
    return "\n".join(lines)

"""Models of the workers' run-times: what training makes of a trace, in memory and in a file."""

import os
from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff import files
from tf_syncdist.cutoff.markov import Chains
from tf_syncdist.cutoff.network import Weights
from tf_syncdist.errors import RunTimeModelError

_KIND, _VERSION = "model of run-times", 1


class Evaluation(NamedTuple):
    """What the cutoffs give on the part of the trace that was not learned from.

    All are contributions per second; the static ones in hindsight, which no policy has.

    Args:
        learned: Of `LearnedCutoff` with the model.
        full_sync: Of waiting for everybody.
        best_static: Of the best fixed number of workers,
        best_count: which is this one.
        oracle: Of a policy that sees the next round's times.
    """

    learned: float
    full_sync: float
    best_static: float
    best_count: int
    oracle: float


class RunTimeModel(NamedTuple):
    """A model of all workers' run-times.

    Args:
        weights: The deep Markov model.
        chains: The hidden Markov chains.
        evaluation: How good they were where they had learned nothing.
    """

    weights: Weights
    chains: Chains
    evaluation: Evaluation

    @property
    def num_workers(self) -> int:
        """Of how many workers."""
        return len(self.chains.group)


def save(path: str | os.PathLike, model: RunTimeModel) -> None:
    """Writes a model to a file.

    Args:
        path: The file, which is replaced if it exists. Models are .npz files; the ending is not
            appended.
        model: The model.
    """
    arrays = {}
    for part, values in model._asdict().items():
        arrays |= {f"{part}.{name}": value for name, value in values._asdict().items()}
    files.save(path, _KIND, _VERSION, arrays)


def load(path: str | os.PathLike) -> RunTimeModel:
    """Reads a model from a file.

    Args:
        path: The file.

    Raises:
        RunTimeModelError: If the file is missing, damaged, something else or of another version.
    """
    arrays = files.load(path, _KIND, _VERSION, RunTimeModelError)
    parts = []
    for part, cls in RunTimeModel.__annotations__.items():
        names = [f"{part}.{name}" for name in cls._fields]
        missing = [name for name in names if name not in arrays]
        wrong = missing or [name for name in names if not np.isfinite(arrays[name]).all()]
        if wrong:
            raise RunTimeModelError(
                f"Expected {', '.join(names)} in the file of a {_KIND}, all of them finite. "
                f"Received: {str(path)!r}, where {wrong[0]} is not. Train the model again."
            )
        parts.append(cls(*(arrays[name] for name in names)))
    weights, chains, evaluation = parts
    figures = (kind(v) for kind, v in zip(Evaluation.__annotations__.values(), evaluation, strict=True))
    model = RunTimeModel(weights, chains, Evaluation(*figures))
    return _checked(model, path)

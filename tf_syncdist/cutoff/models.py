"""Models of the workers' run-times: what training makes of a trace, in memory and in a file."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff import files
from tf_syncdist.cutoff.markov import Chains
from tf_syncdist.cutoff.network import Sizes, Weights
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
    try:
        return _model(arrays)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise RunTimeModelError(
            f"Expected a {_KIND}, as `python -m tf_syncdist.train_cutoff` writes it. Received: "
            f"{str(path)!r}, in which something is missing or does not fit ({type(e).__name__}: "
            f"{e}). Train the model again."
        ) from e


def _model(arrays: Mapping[str, np.ndarray]) -> RunTimeModel:
    def part(name: str, fields: tuple[str, ...]) -> list[np.ndarray]:
        values = [arrays[f"{name}.{field}"] for field in fields]
        for field, value in zip(fields, values, strict=True):
            if value.dtype.kind not in "fiu" or not np.isfinite(value).all():
                raise ValueError(f"{name}.{field} holds no finite numbers")
        return values

    weights = Weights(*part("weights", Weights._fields))
    chains = Chains(*part("chains", Chains._fields))
    learned, full, static, count, oracle = part("evaluation", Evaluation._fields)
    _check_weights(weights, len(chains.group))
    _check_chains(chains)
    evaluation = Evaluation(float(learned), float(full), float(static), int(count), float(oracle))
    return RunTimeModel(weights, chains, evaluation)


def _check_weights(weights: Weights, num_workers: int) -> None:
    sizes = Sizes(
        num_workers,
        len(weights.start),
        len(weights.read_state),
        len(weights.infer_bias),
        len(weights.move_bias),
        len(weights.emit_bias),
        len(weights.spread_bias),
    )
    for name, shape in sizes.shapes().items():
        _check_shape(f"weights.{name}", getattr(weights, name), shape)
    if sizes.spreads not in (1, num_workers):
        raise ValueError(f"weights.spread_bias is of {sizes.spreads} workers")
    if weights.window < 1 or weights.floor <= 0 or weights.scale[1] <= 0:
        raise ValueError("weights.window, .floor and .scale must be positive")


def _check_chains(chains: Chains) -> None:
    num_workers, num_groups = len(chains.group), len(chains.transitions)
    _check_shape("chains.group", chains.group, (num_workers,))
    _check_shape("chains.means", chains.means, (num_workers, 2))
    _check_shape("chains.deviations", chains.deviations, (num_workers, 2))
    _check_shape("chains.transitions", chains.transitions, (num_groups, 2, 2))
    _check_shape("chains.occupancy", chains.occupancy, (num_groups, 2))
    if chains.group.dtype.kind != "i" or set(chains.group) != set(range(num_groups)):
        raise ValueError(f"chains.group does not number groups from 0 to {num_groups - 1}")
    if chains.deviations.min() <= 0 or chains.transitions.min() < 0 or chains.occupancy.min() < 0:
        raise ValueError("chains have deviations or probabilities that are negative")


def _check_shape(name: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)} instead of {list(shape)}")

"""Files of run-time models: they come out as they went in, or are refused."""

from pathlib import Path

import numpy as np
import pytest

from tf_syncdist.cutoff import models, traces
from tf_syncdist.errors import RunTimeModelError

from .models import model
from .regimes import regimes

MODEL = model()


def test_a_model_comes_out_of_its_file_as_it_went_in(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    models.save(path, MODEL)
    loaded = models.load(path)
    assert loaded.num_workers == 24
    assert loaded.evaluation == MODEL.evaluation
    for part in ("weights", "chains"):
        for name, value in getattr(MODEL, part)._asdict().items():
            np.testing.assert_array_equal(getattr(getattr(loaded, part), name), value)
            assert getattr(getattr(loaded, part), name).dtype == value.dtype


def changed(path: Path, **arrays: object) -> None:
    models.save(path, MODEL)
    with np.load(path, allow_pickle=False) as file:
        content = dict(file)
    content |= arrays
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


@pytest.mark.parametrize(
    "arrays, part",
    [
        ({"version": 7}, "which has format 7"),
        ({"kind": "trace of run-times"}, "'trace of run-times'"),
        ({"weights.start": None}, "weights.start"),
        ({"weights.start": np.zeros(3, np.float32)}, "instead of"),
        ({"weights.mean_bias": np.zeros(23, np.float32)}, "instead of [24]"),
        ({"weights.mean_bias": np.full(24, np.nan, np.float32)}, "no finite numbers"),
        ({"weights.mean_bias": np.full(24, "x")}, "no finite numbers"),
        ({"weights.start": np.array(1.0)}, "TypeError"),
        ({"weights.window": np.array(0)}, "must be positive"),
        ({"weights.scale": np.array([0.0, -1.0])}, "must be positive"),
        ({"chains.group": np.full(24, 9)}, "does not number groups"),
        ({"chains.deviations": np.zeros((24, 2))}, "negative"),
        ({"evaluation.learned": None}, "evaluation.learned"),
    ],
)
def test_a_file_in_which_something_is_wrong_is_refused(
    arrays: dict, part: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.npz"
    changed(path, **arrays)
    with pytest.raises(RunTimeModelError, match="Received: ") as error:
        models.load(path)
    assert part in str(error.value) and str(path) in str(error.value)


def test_a_file_that_was_cut_off_or_is_a_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    models.save(path, MODEL)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RunTimeModelError, match="cut off"):
        models.load(path)
    traces.save(path, traces.of_seconds(regimes(5, 3, 1, 1.0, seed=0)))
    with pytest.raises(RunTimeModelError, match="'trace of run-times'"):
        models.load(path)
    with pytest.raises(RunTimeModelError, match="which is not there"):
        models.load(tmp_path / "none.npz")

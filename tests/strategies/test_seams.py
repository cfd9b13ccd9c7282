"""A version of TensorFlow or Keras that has moved something private is refused in one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tf_syncdist

pytestmark = pytest.mark.timeout(280)

_STRATEGIES = Path(tf_syncdist.__file__).parent / "strategies"

# Each of them takes something away before the package is imported.
SEAMS = {
    "keras": (
        "import keras; del keras.optimizers.LossScaleOptimizer.check_finite",
        r"uses `keras\.[\w.]+\.LossScaleOptimizer\.check_finite`, which Keras \S+ does not have\. "
        r"Install a version of Keras",
    ),
    "tensorflow": (
        "from tensorflow.python.distribute import values; del values.SyncOnReadVariable",
        r"uses `tensorflow\.python\.distribute\.values\.SyncOnReadVariable`, which TensorFlow \S+ "
        r"does not have\. Install a version of TensorFlow",
    ),
}


@pytest.mark.parametrize("name", SEAMS)
def test_what_has_moved_is_named(name: str) -> None:
    before, expected = SEAMS[name]
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\nimport tf_syncdist\ntf_syncdist.SyncReplicasStrategy"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=_STRATEGIES.parents[1],
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tf_syncdist.errors.UnsupportedVersionError: tf_syncdist ")
    assert re.search(expected, last), last


def test_only_one_file_touches_private_modules() -> None:
    private = re.compile(r"tensorflow\.python|keras\.src")
    found = {
        path.name for path in _STRATEGIES.parent.rglob("*.py") if private.search(path.read_text())
    }
    assert found == {"adapter.py"}

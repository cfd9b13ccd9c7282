"""What is public, and what importing it costs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tf_syncdist

_PROBE = """
import sys, tf_syncdist, tf_syncdist.errors, tf_syncdist.cutoff, tf_syncdist.aggregation.server
sys.exit(",".join(m for m in ("tensorflow", "keras", "ml_dtypes") if m in sys.modules) or 0)
"""


@pytest.mark.parametrize("name", tf_syncdist.__all__)
def test_a_public_name_can_be_loaded_and_says_what_it_is(name: str) -> None:
    assert getattr(tf_syncdist, name).__doc__.strip()
    assert name in dir(tf_syncdist)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tf_syncdist.nothing


def test_the_service_does_without_tensorflow() -> None:
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=60)
    assert probe.returncode == 0, probe.stderr.decode()


def test_the_public_names_are_documented() -> None:
    root = Path(__file__).parents[1]
    text = "".join(
        p.read_text() for p in (root / "README.md", *sorted((root / "docs").glob("*.md")))
    )
    missing = [n for n in (*tf_syncdist.__all__, *tf_syncdist.errors.__all__) if n not in text]
    assert not missing


def test_nothing_is_ever_unpickled() -> None:
    """Whatever comes over the network or out of a file must not be able to run code."""
    code = Path(tf_syncdist.__file__).parent
    forbidden = re.compile(
        r"\b(pickle|marshal|shelve|dill|joblib)\b|\b(eval|exec)\(|np\.load\((?!.*allow_pickle=False)"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in code.rglob("*.py")
        for line in path.read_text().splitlines()
        if forbidden.search(line) and "_pb2" not in path.name
    ]
    assert not found

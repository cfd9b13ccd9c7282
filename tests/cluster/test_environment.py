"""The environment variables of tasks."""

import shutil
from pathlib import Path

import pytest

import tf_syncdist
from tf_syncdist.cluster.environment import shared_environment

PACKAGE = Path(tf_syncdist.__file__).parent


def test_an_installed_copy_that_is_the_same_is_not_worth_a_word(tmp_path: Path) -> None:
    copy = shutil.copytree(
        PACKAGE, tmp_path / "tf_syncdist", ignore=shutil.ignore_patterns("__pycache__")
    )
    assert shared_environment({}, str(copy / "__init__.py"))[1] is None


@pytest.mark.parametrize("change", ["changed", "missing", "added"])
def test_an_installed_copy_that_differs_is_named(tmp_path: Path, change: str) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "tf_syncdist")
    if change == "changed":
        (copy / "errors.py").write_text("")
    elif change == "missing":
        (copy / "errors.py").unlink()
    else:
        (copy / "more.py").write_text("")
    _, warning = shared_environment({}, str(copy / "__init__.py"))
    assert str(copy) in warning and str(PACKAGE) in warning

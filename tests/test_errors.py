"""Each error is explained where its message sends the user."""

import inspect
import re
from pathlib import Path

import pytest

from tf_syncdist import errors

_PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text()
_SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", _PAGE, re.DOTALL | re.MULTILINE))
_CLASSES = [
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, BaseException)
]


@pytest.mark.parametrize("name", _CLASSES)
def test_a_class_has_a_section_and_points_to_it(name: str) -> None:
    assert name in errors.__all__
    text = _SECTIONS[name]
    for part in ("**What happened.**", "**Usual causes.**", "**What to do.**"):
        assert text.count(part) == 1, part
    last = inspect.getdoc(getattr(errors, name)).splitlines()[-1]
    assert last == f"See docs/errors.md#{name.lower()}."


def test_the_page_explains_nothing_else() -> None:
    assert sorted(_SECTIONS) == sorted(_CLASSES)
    assert all(issubclass(getattr(errors, name), errors.SyncDistError) for name in _CLASSES)

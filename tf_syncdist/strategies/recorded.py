"""Errors that TensorFlow would bury in one of its own."""

from typing import Protocol


class HasError(Protocol):
    """What remembers the first error."""

    error: BaseException | None


class recorded:
    """Remembers an error that TensorFlow would otherwise bury in one of its own."""

    def __init__(self, owner: HasError) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        if self._owner.error is not None:
            raise self._owner.error

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self._owner.error is None:
            self._owner.error = error

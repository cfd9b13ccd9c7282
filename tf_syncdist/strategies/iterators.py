"""Reads a worker's input: for each run a batch for every learner, and so many runs an epoch.

What is taken apart or counted within tf.data takes a call of a function there for each run. On a
small model that is a fifth of a step, by threads that learners need.
"""

from typing import Any

import tensorflow as tf

from tf_syncdist.strategies import adapter


class WorkerIterator(tf.data.Iterator):
    """Takes elements of a dataset's iterator, several for each of its own.

    Args:
        elements: The iterator over the dataset.
        count: An iterator that ends where this one does, after as many elements as this one has;
            `None` if it ends with the dataset.
        parts: How many elements make one of this iterator's, which has PerReplica values of them;
            1 for the elements as they are. A rest of fewer is left out.
    """

    def __init__(
        self, elements: tf.data.Iterator, count: tf.data.Iterator | None = None, parts: int = 1
    ) -> None:
        super().__init__()
        self.elements = elements
        self.count = count
        self.parts = parts
        self._own_spec: WorkerIteratorSpec | None = None

    @property
    def element_spec(self) -> Any:
        """The specification of an element."""
        return parted(self.elements.element_spec, self.parts)

    def __iter__(self) -> "WorkerIterator":
        return self

    def __next__(self) -> Any:
        try:
            return self.get_next()
        except tf.errors.OutOfRangeError:
            raise StopIteration from None

    def get_next(self) -> Any:
        """Returns the next element.

        Raises:
            tf.errors.OutOfRangeError: If there is none.
        """
        counted = [] if self.count is None else [self.count.get_next()]
        with tf.control_dependencies(counted):
            return _together([self.elements.get_next() for _ in range(self.parts)])

    def get_next_as_optional(self) -> tf.experimental.Optional:
        """Returns the next element, if there is one, as an Optional."""
        spec = self.element_spec

        def empty() -> tf.experimental.Optional:
            return tf.experimental.Optional.empty(spec)

        def read() -> tf.experimental.Optional:
            found = [self.elements.get_next_as_optional() for _ in range(self.parts)]
            return tf.cond(
                found[-1].has_value(),
                lambda: tf.experimental.Optional.from_value(
                    _together([f.get_value() for f in found])
                ),
                empty,
            )

        if self.count is None:
            return read()
        return tf.cond(self.count.get_next_as_optional().has_value(), read, empty)

    @property
    def _type_spec(self) -> "WorkerIteratorSpec":
        if self._own_spec is None:
            self._own_spec = WorkerIteratorSpec(
                self.elements.element_spec, self.count is not None, self.parts
            )
        return self._own_spec

    def from_here(self, runs: int) -> "WorkerIterator":
        """Returns an iterator that goes on with the same elements, for so many of its own."""
        count = iter(tf.data.Dataset.range(runs))
        found = WorkerIterator(self.elements, count, self.parts)
        found._own_spec = self._own_spec if self.count is not None else None
        return found


class WorkerIteratorSpec(tf.TypeSpec):
    """What a `WorkerIterator` is to a tf.function that takes it.

    A tf.function looks at it in every call, so what that takes is kept small.

    Args:
        spec: The specification of an element of the dataset.
        counts: Whether there is an iterator that tells where it ends.
        parts: See `WorkerIterator`.
    """

    def __init__(self, spec: Any, counts: bool, parts: int) -> None:
        self._spec = spec
        self._counts = counts
        self._parts = parts
        self._hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    @property
    def value_type(self) -> type:
        """`WorkerIterator`."""
        return WorkerIterator

    def _serialize(self) -> tuple:
        return self._spec, self._counts, self._parts

    @property
    def _component_specs(self) -> tuple[tf.TensorSpec, ...]:
        return (tf.TensorSpec((), tf.resource),) * (1 + self._counts)

    def _to_components(self, value: WorkerIterator) -> tuple[tf.Tensor, ...]:
        iterators = [value.elements] if value.count is None else [value.elements, value.count]
        return tuple(tf.nest.flatten(iterators, expand_composites=True))

    def _from_components(self, components: tuple[tf.Tensor, ...]) -> WorkerIterator:
        specs = (self._spec, tf.TensorSpec((), tf.int64))
        found = [
            tf.nest.pack_sequence_as(tf.data.IteratorSpec(spec), [part], expand_composites=True)
            for spec, part in zip(specs, components, strict=False)
        ]
        return WorkerIterator(*found, *[None] * (2 - len(found)), self._parts)


def parted(spec: Any, parts: int) -> Any:
    """Returns the specification of PerReplica values with so many parts."""
    return spec if parts == 1 else adapter.per_replica_spec(spec, parts)


def _together(elements: list) -> Any:
    return elements[0] if len(elements) == 1 else adapter.per_replica(elements)

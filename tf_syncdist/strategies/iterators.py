"""Reads a worker's input: for each run a batch for every learner, and so many runs an epoch.

What is taken apart or counted within tf.data takes a call of a function there for each run, and
each element that is read wakes a thread: on a small model a tenth of a step each.
"""

from typing import Any

import tensorflow as tf

from tf_syncdist.strategies import adapter


class WorkerIterator(tf.data.Iterator, tf.distribute.DistributedIterator):
    """Reads a dataset's iterator; each element may have parts, which become PerReplica values.

    Args:
        elements: The iterator over the dataset.
        count: An iterator that ends where this one does, after as many elements as this one has;
            `None` if it ends with the dataset.
        parts: How many parts an element has; 1 for the dataset's elements as they are.
        size: Of a part, where an element of the dataset is a batch with all of them, one behind the
            other. `None` where each of its elements is a part; a rest of fewer is left out.
    """

    def __init__(
        self,
        elements: tf.data.Iterator,
        count: tf.data.Iterator | None = None,
        parts: int = 1,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.elements = elements
        self.count = count
        self.parts = parts
        self.size = size
        self._own_spec: WorkerIteratorSpec | None = None
        if tf.executing_eagerly():
            # A checkpoint of this one has where they are.
            self._track_trackable(elements, "elements")
            if count is not None:
                self._track_trackable(count, "count")

    @property
    def element_spec(self) -> Any:
        """The specification of an element."""
        return parted(self.elements.element_spec, self.parts, self.size)

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
            found = [self._again().get_next() for _ in range(self._reads)]
        if self.count is None and len(found) > 1 and not tf.executing_eagerly():
            # No learner begins with a rest before it is known that there are too few for all.
            last = tf.nest.flatten(found[-1], expand_composites=True)
            with tf.control_dependencies([t for t in last if t is not None]):
                found = tf.nest.map_structure(_identity, found, expand_composites=True)
        return self._together(found)

    def get_next_as_optional(self) -> tf.experimental.Optional:
        """Returns the next element, if there is one, as an Optional."""
        spec = self.element_spec

        def empty() -> tf.experimental.Optional:
            return tf.experimental.Optional.empty(spec)

        def read() -> tf.experimental.Optional:
            found = [self.elements.get_next_as_optional() for _ in range(self._reads)]
            return tf.cond(
                found[-1].has_value(),
                lambda: tf.experimental.Optional.from_value(
                    self._together([f.get_value() for f in found])
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
                self.elements.element_spec, self.count is not None, self.parts, self.size
            )
        return self._own_spec

    def from_here(self, runs: int) -> "WorkerIterator":
        """Returns an iterator that goes on with the same elements, for so many of its own."""
        count = iter(tf.data.Dataset.range(runs))
        found = WorkerIterator(self.elements, count, self.parts, self.size)
        found._own_spec = self._own_spec if self.count is not None else None
        return found

    def _again(self) -> tf.data.Iterator:
        """Returns the iterator over the dataset, as one that was not read in this graph yet.

        TensorFlow takes the 33rd read of one for a loop that does not end.
        """
        if self._reads == 1 or tf.executing_eagerly():
            return self.elements
        return tf.nest.map_structure(lambda t: t, self.elements, expand_composites=True)

    @property
    def _reads(self) -> int:
        return self.parts if self.size is None else 1

    def _together(self, elements: list) -> Any:
        if self.parts == 1:
            return elements[0]
        if self.size is None:
            return adapter.per_replica(elements)
        # Where they were read, or all of it would go through the first GPU.
        with tf.device("/CPU:0"):
            flat = [tf.split(t, self.parts) for t in tf.nest.flatten(elements[0])]
        return adapter.per_replica(
            [tf.nest.pack_sequence_as(elements[0], part) for part in zip(*flat, strict=True)]
        )


class WorkerIteratorSpec(tf.TypeSpec):
    """What a `WorkerIterator` is to a tf.function that takes it.

    A tf.function looks at it in every call, so what that takes is kept small.

    Args:
        spec: The specification of an element of the dataset.
        counts: Whether there is an iterator that tells where it ends.
        parts: See `WorkerIterator`.
        size: See `WorkerIterator`.
    """

    def __init__(self, spec: Any, counts: bool, parts: int, size: int | None) -> None:
        self._spec = spec
        self._counts = counts
        self._parts = parts
        self._size = size
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
        return self._spec, self._counts, self._parts, self._size

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
        return WorkerIterator(*found, *[None] * (2 - len(found)), self._parts, self._size)


def _identity(value: Any) -> Any:
    return value if value is None else tf.identity(value)


def parted(spec: Any, parts: int, size: int | None = None) -> Any:
    """Returns the specification of PerReplica values; see `WorkerIterator`."""
    if parts == 1:
        return spec
    if size is not None:
        spec = tf.nest.map_structure(
            lambda s: tf.TensorSpec([size, *s.shape[1:]], s.dtype, s.name), spec
        )
    return adapter.per_replica_spec(spec, parts)

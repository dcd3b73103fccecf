"""What processes of one program tell each other: small JSON values, by collectives that all of them call in order."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from popax import errors
from popax.errors import PopaxError, ProcessError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """All processes of this program; one alone where it has one. Every method but `leads` is called by all of them."""

    index: int
    count: int

    @classmethod
    def current(cls) -> "ProcessGroup":
        """The processes that jax knows."""
        return cls(index=jax.process_index(), count=jax.process_count())

    @classmethod
    def of(cls, mesh: Mesh | None) -> "ProcessGroup":
        """All processes where the mesh spans them; else this one alone, which then waits for nobody."""
        spanned = mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1
        return cls.current() if spanned else cls(index=0, count=1)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's JSON value, in their order."""
        if self.count == 1:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.asarray(multihost_utils.process_allgather(np.asarray([len(text)], np.int32))).reshape(-1)
        # A power of two: each length is a shape, and each shape is compiled.
        padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
        padded[: len(text)] = text
        rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(self.count, -1)
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set anywhere."""
        return any(self.gather(bool(flag)))

    def barrier(self) -> None:
        """Returns once all are here."""
        self.gather(None)

    def leader_first(self, work: Callable[[], T]) -> T:
        """work() by process 0, then by the others, who find what it made.

        Its error is raised by all: one of popax's by its name, any other as a ProcessError that says which it is.
        """
        if self.count == 1:
            return work()
        if self.leads:
            try:
                made = work()
            except BaseException as error:
                # Whatever it is, the others wait for it.
                self.gather({"name": type(error).__name__, "message": str(error)})
                raise
            self.gather(None)
            return made
        if (failure := self.gather(None)[0]) is not None:
            kind = getattr(errors, failure["name"], None)
            if isinstance(kind, type) and issubclass(kind, PopaxError):
                raise kind(f"process 0: {failure['message']}")
            raise ProcessError(f"process 0: {failure['name']}: {failure['message']}")
        return work()

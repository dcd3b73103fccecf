"""A base's weights in the files they lie in: loaded onto a mesh, or read one at a time, and named by their digest."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from popax.distributed.group import ProcessGroup
from popax.errors import CheckpointError
from popax.modeling.digest import TensorRecord, digest_records
from popax.modeling.exchange import Exchange, plan_exchange
from popax.modeling.hashing import Hashing
from popax.modeling.model import Model
from popax.modeling.shards import Device, ReadPart, Source, read_array, read_shard, read_shards
from popax.modeling.tensor_files import StoredTensor
from popax.sharding import ShardingRules
from popax.trees import flatten_named, unflatten_named
from popax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """sources: of every parameter, checked to fit the model. equal: two tensors that have to hold the same values."""

    directory: Path
    model: Model
    sources: Mapping[str, Source]
    equal: tuple[StoredTensor, StoredTensor] | None = None

    def load(
        self,
        *,
        mesh: Mesh | None = None,
        rules: ShardingRules | None = None,
        verify: bool = False,
        exchange: bool | None = None,
    ) -> tuple[Params, str]:
        """(params as the model has them, digest of the tensors as stored), in one pass over the files.

        Host memory holds the shards of this process and, beside them, a strip of a tensor for each thread. exchange:
        every process reads an equal share of each tensor's rows and the devices swap, one parameter at a time, so that
        all processes together read the files once; by default where there are several. Hashes are made on the way where
        they are not noted, and shared out over the processes of the mesh, which call this together; verify: made in any
        case. Raises CheckpointError where processes have read different weights.
        """
        group, params = ProcessGroup.of(mesh), {}
        places = self._places(mesh, rules, group.count > 1 if exchange is None else exchange)
        with self._hashing(group, verify) as hashing:
            for name, read in self._readers(hashing):
                place = places[name]
                if place.exchange is not None:
                    params[name] = place.exchange(read)
                elif place.read is None:
                    params[name] = read_shards(read, place.shape, None, [None])[None]
                else:
                    params[name] = read_array(read, place.shape, place.read)
            return unflatten_named(params), self._digest(hashing)

    def load_shards(
        self,
        mesh: Mesh,
        devices: Sequence[Device],
        *,
        rules: ShardingRules | None = None,
        exchange: bool = False,
    ) -> tuple[dict[str, dict[Device, jax.Array]], str]:
        """({parameter: {device: its shard}}, digest): what `load` reads for as few of the mesh's devices as are wanted.

        exchange: the shares that are exchanged, before they are.
        """
        places = self._places(mesh, rules, exchange)
        with self._hashing(ProcessGroup.of(mesh), False) as hashing:
            shards = {
                name: read_shards(read, places[name].shape, places[name].read, devices)
                for name, read in self._readers(hashing)
            }
            return shards, self._digest(hashing)

    def _places(self, mesh: Mesh | None, rules: ShardingRules | None, exchange: bool) -> dict[str, "_Place"]:
        shapes, places = flatten_named(self.model.abstract()), {}
        if mesh is None:
            return {name: _Place(like.shape, None, None) for name, like in shapes.items()}
        for name, wanted in flatten_named(self.model.shardings(mesh, rules)).items():
            like = shapes[name]
            options = {"stacked": self.sources[name].stacked, "transposed": self.sources[name].transposed}
            plan = plan_exchange(like, wanted, **options) if exchange else None
            places[name] = _Place(like.shape, wanted if plan is None else plan.read, plan)
        return places

    def _readers(self, hashing: Hashing) -> Iterator[tuple[str, ReadPart]]:
        """One parameter after the other: (name, what reads a part of it); its hashing begins with it."""
        shapes = flatten_named(self.model.abstract())
        for name, source in self.sources.items():
            hashing.begin(self._stored(name))
            shape, dtype = shapes[name].shape, np.dtype(shapes[name].dtype)
            yield name, functools.partial(read_shard, source, shape, dtype, hashing.pool)

    def digest(self, *, verify: bool = False) -> str:
        """The same digest, without loading the weights."""
        with self._hashing(ProcessGroup.of(None), verify) as hashing:
            return self._digest(hashing)

    def read(self, name: str) -> np.ndarray:
        """One whole parameter, in the host's memory."""
        like = flatten_named(self.model.abstract())[name]
        with ThreadPoolExecutor() as pool:
            return read_shard(
                self.sources[name], like.shape, np.dtype(like.dtype), pool, (slice(None),) * len(like.shape)
            )

    def _stored(self, name: str) -> list[StoredTensor]:
        return [part for tensor in self.sources[name].tensors for part in tensor.stored]

    def _hashing(self, group: ProcessGroup, verify: bool) -> Hashing:
        stored = [part for name in self.sources for part in self._stored(name)] + list(self.equal or ())
        return Hashing(self.directory, stored, group, verify=verify)

    def _digest(self, hashing: Hashing) -> str:
        hashes, group = hashing.finish(), hashing.group
        if self.equal and len({hashes[tensor.name] for tensor in self.equal}) > 1:
            first, second = (tensor.name for tensor in self.equal)
            raise CheckpointError(
                f"{self.directory}: the config says tie_word_embeddings, but {first} and {second} differ; set "
                "tie_word_embeddings to false, or remove the one that is not meant"
            )
        parts = (part for name in self.sources for part in self._stored(name))
        records = (TensorRecord(part.name, part.dtype, part.shape, hashes[part.name]) for part in parts)
        digest = digest_records(records, self.model.unquantised.config)
        digests = group.gather(digest)
        if len(set(digests)) > 1:
            found = ", ".join(f"process {index}: {value[:12]}" for index, value in enumerate(digests))
            raise CheckpointError(
                f"{self.directory}: the processes have different weights or configs there ({found}); give all of them "
                "the same files"
            )
        return digest


class _Place(NamedTuple):
    """read: how the devices read the parameter, None: the one device that there is; exchange: what follows."""

    shape: tuple[int, ...]
    read: NamedSharding | None
    exchange: Exchange | None

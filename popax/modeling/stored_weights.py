"""A base's weights in the files they lie in: loaded onto a mesh, or read one at a time, and named by their digest."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from popax.distributed.group import ProcessGroup
from popax.errors import CheckpointError
from popax.modeling.digest import TensorRecord, digest_records
from popax.modeling.hashing import Hashing
from popax.modeling.model import Model
from popax.modeling.shards import Device, Source, read_shard, read_shards
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
        self, *, mesh: Mesh | None = None, rules: ShardingRules | None = None, verify: bool = False
    ) -> tuple[Params, str]:
        """(params as the model has them, digest of the tensors as stored), in one pass over the files.

        Host memory holds the shards of this process and, beside them, a strip of a tensor for each thread. Hashes are
        made on the way where they are not noted, and shared out over the processes of the mesh, which call this
        together; verify: made in any case. Raises CheckpointError where processes have read different weights.
        """
        shapes = flatten_named(self.model.abstract())
        if mesh is None:
            arrays, digest = self.load_shards(None, [None], rules=rules, verify=verify)
            return unflatten_named({name: shards[None] for name, shards in arrays.items()}), digest
        shardings = flatten_named(self.model.shardings(mesh, rules))
        arrays, digest = self.load_shards(mesh, mesh.local_devices, rules=rules, verify=verify)
        params = {
            name: jax.make_array_from_single_device_arrays(shapes[name].shape, shardings[name], list(shards.values()))
            for name, shards in arrays.items()
        }
        return unflatten_named(params), digest

    def load_shards(
        self,
        mesh: Mesh | None,
        devices: Sequence[Device | None],
        *,
        rules: ShardingRules | None = None,
        verify: bool = False,
    ) -> tuple[dict[str, dict[Device | None, jax.Array]], str]:
        """({parameter: {device: its shard}}, digest) of these devices of the mesh; None: the default device, and all.

        What `load` makes the parameters of, for as few of the devices as are wanted.
        """
        shapes = flatten_named(self.model.abstract())
        shardings = flatten_named(self.model.shardings(mesh, rules)) if mesh is not None else dict.fromkeys(shapes)
        with self._hashing(ProcessGroup.of(mesh), verify) as hashing:
            arrays = {}
            for name, source in self.sources.items():
                hashing.begin(self._stored(name))
                arrays[name] = read_shards(source, shapes[name], shardings[name], devices, hashing.pool)
            return arrays, self._digest(hashing)

    def digest(self, *, verify: bool = False) -> str:
        """The same digest, without loading the weights."""
        with self._hashing(ProcessGroup.of(None), verify) as hashing:
            return self._digest(hashing)

    def read(self, name: str) -> np.ndarray:
        """One whole parameter, in the host's memory."""
        like = flatten_named(self.model.abstract())[name]
        with ThreadPoolExecutor() as pool:
            return read_shard(self.sources[name], like.shape, like.dtype, (slice(None),) * len(like.shape), pool)

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

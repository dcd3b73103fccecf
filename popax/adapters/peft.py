"""Hugging Face PEFT directories in and out: adapter_config.json and adapter_model.safetensors."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from popax.adapters.base import AdapterConfig, SiteSpec
from popax.adapters.cohort import Cohort
from popax.adapters.peft_config import config_of, read_record, record_of
from popax.adapters.peft_layout import layout_of, module_names
from popax.adapters.peft_native import PREFIX, native, read_native
from popax.atomic import new_directory
from popax.errors import PeftError
from popax.types import AdapterState, SiteInfo

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Tensors = dict[str, np.ndarray]


def save_peft(
    directory: str | os.PathLike[str],
    adapter: AdapterState,
    *,
    config: AdapterConfig,
    specs: Mapping[str, SiteSpec],
    shared: AdapterState | None = None,
    base_name: str = "",
    overwrite: bool = False,
) -> Path:
    """Write one user's adapter as a PEFT directory; it appears whole or not at all.

    A method that PEFT has in a form of its own (`AdapterMethod.peft`) is written so. Any other is written as LoRA:
    lora_A [r, D] and lora_B [F, r] of each module, without columns beyond the layer's rank, in the adapter's dtype
    (float32 where a method's factors do not fit it); one with shared arrays (lora_xs) as its exact LoRA factors.
    shared: of the cohort, where it has any. base_name: the base's path or name for peft. Raises PeftError where the
    directory exists (overwrite=True replaces one that holds a PEFT adapter and nothing else), where PEFT has no form of
    the method, where the adapter does not fit the config, or where it cannot be written.
    """
    cohort = Cohort(config, tuple(specs.values()))
    _check_fits(cohort, adapter, shared)
    if cohort.method.peft is not None:
        tensors, record = native(cohort, adapter, shared or {}, base_name)
    else:
        tensors, times = _tensors(cohort, adapter, shared or {})
        record = record_of(config, specs, base_name, times)
    files = {
        CONFIG: json.dumps(record, indent=2, sort_keys=True).encode() + b"\n",
        WEIGHTS: safetensors.numpy.save(tensors, metadata={"format": "pt"}),
    }
    return _write_directory(Path(directory), files, overwrite)


def directory_digests(directory: str | os.PathLike[str]) -> dict[str, str]:
    """sha256 of a PEFT directory's files, by their names: where an imported adapter comes from."""
    files = [Path(directory) / name for name in (CONFIG, WEIGHTS)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}


def load_peft(
    directory: str | os.PathLike[str],
    sites: Mapping[str, SiteInfo],
    *,
    dtype: str | None = None,
    base_weight: Callable[[str], jax.Array | np.ndarray] | None = None,
    base_bias: Callable[[str], jax.Array | np.ndarray | None] = lambda site: None,
) -> tuple[AdapterConfig, AdapterState]:
    """Read a PEFT directory, of LoRA or a kind that a method claims: (config, adapter) of `Cohort.of(config, sites)`.

    dtype: of the adapter, default the file's own. base_weight(site), base_bias(site): as `Cohort.shared` takes them;
    kinds of their own need them, since popax keeps what differs from the base. peft copies the head's frozen weight
    beside a LoRA of the head: with base_weight the copy is compared with the base, without it refused. Raises PeftError
    where popax cannot represent what the directory holds; pickled weights are never opened.
    """
    directory = Path(directory)
    record, own = read_record(directory / CONFIG)
    tensors = _read_tensors(directory)
    _drop_head_copy(tensors, sites, base_weight)
    if own is not None:
        if base_weight is None:
            raise PeftError(
                f"{directory} holds {own.name}, which is kept as a difference from the base: pass base_weight="
            )
        kept = dtype or _one_dtype(directory, tensors)
        return read_native(own, record, tensors, sites, (base_weight, base_bias), kept)
    layout = layout_of(record, sites)
    modules = {
        module: (name, layer, layers[layer][0])
        for name, layers in layout.items()
        for layer, module in enumerate(module_names(sites[name]))
        if layers[layer][0]
    }
    expected = {}
    for module, (name, _, rank) in modules.items():
        expected[f"{PREFIX}{module}.lora_A.weight"] = (rank, sites[name].d_in)
        expected[f"{PREFIX}{module}.lora_B.weight"] = (sites[name].d_out, rank)
    _check_tensors(directory, expected, tensors)
    config, specs = config_of(record, layout, sites, dtype=dtype or _one_dtype(directory, tensors))
    adapter = {name: _zeros(spec, config.dtype) for name, spec in specs.items()}
    for module, (name, layer, rank) in modules.items():
        index = (layer, slice(rank)) if sites[name].layers else slice(rank)
        adapter[name]["a"][index] = tensors[f"{PREFIX}{module}.lora_A.weight"].astype(config.dtype)
        adapter[name]["b"][index] = tensors[f"{PREFIX}{module}.lora_B.weight"].T.astype(config.dtype)
    return config, jax.tree.map(jnp.asarray, adapter)


def _check_fits(cohort: Cohort, adapter: AdapterState, shared: AdapterState | None) -> None:
    """Raises PeftError where the adapter's leaves are not the cohort's, and where PEFT has no form of it."""
    if not cohort.adds and cohort.method.peft is None:
        raise PeftError(
            f"method {cohort.config.method} is no LoRA: its change of a weight is no product of two factors"
        )
    have, want = jax.tree.map(jnp.shape, adapter), jax.tree.map(lambda leaf: leaf.shape, cohort.abstract())
    if have != want:
        raise PeftError(f"the adapter does not fit its config: its leaves are {have}, the config's {want}")
    if cohort.method.shared_axes and shared is None:
        raise PeftError(f"method {cohort.method.name} is whole only together with its shared arrays: pass shared=")


def _tensors(cohort: Cohort, adapter: AdapterState, shared: AdapterState) -> tuple[Tensors, int]:
    """A LoRA file's tensors, and how many times the cohort's rank they have."""
    tensors: Tensors = {}
    times = 1
    for name, spec in cohort.specs.items():
        a, b = (np.asarray(factor) for factor in cohort.factors(name, adapter, shared))
        a, b = (a, b) if spec.info.layers else (a[None], b[None])
        times = a.shape[1] // spec.rank
        for layer, module in enumerate(module_names(spec.info)):
            rank = spec.ranks[layer]
            own = np.tile(np.arange(spec.rank) < rank, times)
            if a[layer, ~own].any() and b[layer, ~own].any():
                raise PeftError(f"{module} has rank {rank}, but the adapter's columns beyond it are not zero")
            if rank:
                tensors[f"{PREFIX}{module}.lora_A.weight"] = a[layer, own]
                tensors[f"{PREFIX}{module}.lora_B.weight"] = b[layer, own].T
    dtype = jnp.result_type(*jax.tree.leaves(adapter))
    narrow = {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in tensors.items()}
    exact = all(np.array_equal(narrow[name].astype(np.float32), tensors[name], equal_nan=True) for name in tensors)
    return (narrow if exact else {name: np.ascontiguousarray(each) for name, each in tensors.items()}), times


def _write_directory(directory: Path, files: Mapping[str, bytes], overwrite: bool) -> Path:
    if directory.exists() or directory.is_symlink():
        if not overwrite:
            raise PeftError(f"{directory} exists; choose another path or pass overwrite=True")
        others = (
            sorted({entry.name for entry in directory.iterdir()} - set(files)) if directory.is_dir() else ["a file"]
        )
        if others or directory.is_symlink():
            raise PeftError(
                f"{directory} is not a PEFT directory alone ({', '.join(others) or 'a link'}): remove it first"
            )
    try:
        with new_directory(directory, replace=True) as fresh:
            fresh.mkdir()
            for name, data in files.items():
                with (fresh / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
    except OSError as error:
        raise PeftError(f"cannot write {directory}: {error}; nothing was written") from error
    return directory


def _read_tensors(directory: Path) -> Tensors:
    path = directory / WEIGHTS
    if not path.exists():
        pickled = " (adapter_model.bin is a pickle, which can run code: save it from peft with safe_serialization=True)"
        raise PeftError(f"{path} does not exist" + (pickled if (directory / "adapter_model.bin").exists() else ""))
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise PeftError(f"{path} is truncated or not a safetensors file: {error}") from error
    tensors: Tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise PeftError(f"{path}: {name} is {entry['dtype']}; popax reads {', '.join(DTYPES)}")
        tensors[name] = np.frombuffer(entry["data"], jnp.dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])
    return tensors


def _drop_head_copy(
    tensors: Tensors, sites: Mapping[str, SiteInfo], base_weight: Callable[[str], jax.Array | np.ndarray] | None
) -> None:
    """Take the copy of the frozen head that peft writes beside a LoRA of it out of `tensors`, once it is the base's."""
    name = f"{PREFIX}lm_head.base_layer.weight"
    if name not in tensors or "lm_head" not in sites:
        return
    if base_weight is None:
        raise PeftError(
            f"{name} is a copy of the base's head, which may have been changed: pass base_weight= to compare it, or "
            "save from peft with save_embedding_layers=False"
        )
    copy_FxD, base_FxD = tensors.pop(name), np.asarray(base_weight("lm_head")).T
    # The copy is in the dtype that peft ran in, the base in ours: equal up to the rounding of the coarser one.
    dtype = min((copy_FxD.dtype, base_FxD.dtype), key=lambda each: (jnp.finfo(each).nmant, jnp.finfo(each).bits))
    if copy_FxD.shape != base_FxD.shape or not np.array_equal(copy_FxD.astype(dtype), base_FxD.astype(dtype)):
        raise PeftError(
            f"{name} {copy_FxD.shape} is not this base's head {base_FxD.shape}: the adapter is for another base"
        )


def _check_tensors(directory: Path, expected: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
    def listed(names: set[str]) -> str:
        return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    if unknown := set(tensors) - set(expected):
        raise PeftError(
            f"{directory / WEIGHTS} holds tensors that its config or this model has no place for: {listed(unknown)}"
        )
    if missing := set(expected) - set(tensors):
        raise PeftError(f"{directory / WEIGHTS} lacks tensors that its config names: {listed(missing)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise PeftError(
                f"{directory / WEIGHTS}: {name} is {tensors[name].shape}, this model and the config need {shape}"
            )


def _one_dtype(directory: Path, tensors: Tensors) -> str:
    dtypes = sorted({tensor.dtype.name for tensor in tensors.values()})
    if len(dtypes) != 1:
        raise PeftError(f"{directory / WEIGHTS} mixes {', '.join(dtypes)}: choose one with dtype=")
    return dtypes[0]


def _zeros(spec: SiteSpec, dtype: str) -> dict[str, np.ndarray]:
    lead = (spec.info.layers,) if spec.info.layers else ()
    widths = {"a": spec.info.d_in, "b": spec.info.d_out}
    return {leaf: np.zeros((*lead, spec.rank, width), jnp.dtype(dtype)) for leaf, width in widths.items()}

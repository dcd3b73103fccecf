"""A base: a model with its frozen weights and the digest that adapters are bound to. Loading and saving."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from popax.errors import CheckpointError, ConfigError, PopaxError
from popax.modeling import hf
from popax.modeling.config import ModelConfig
from popax.modeling.digest import digest_params, digest_quantised
from popax.modeling.model import Model
from popax.modeling.quantise_rules import QuantiseRules, as_rules
from popax.modeling.quantised import SCALES, VALUES, Quantised, round_weight
from popax.sharding import ShardingRules
from popax.trees import flatten_named, unflatten_named
from popax.types import EMBED, Params

RECORD, WEIGHTS = "popax_base.json", "weights"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """digest: of the weights as first stored and of what of the config changes their function; it does not depend on
    the dtype or the mesh they are loaded with. source: where the weights came from, for people to read."""

    model: Model
    params: Params
    digest: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """What is known of a base that is not loaded. site_weight(site), site_bias(site): its arrays there, as those of
    `Model`, read when they are asked for."""

    model: Model
    digest: str
    source: str
    site_weight: Callable[[str], jax.Array | np.ndarray]
    site_bias: Callable[[str], jax.Array | np.ndarray | None]


def new_base(model: Model, params: Params, *, source: str) -> Base:
    """A base of weights that were made here (trained, or random): its digest is of the parameters in memory."""
    return Base(model=model, params=params, digest=digest_params(params, model.config), source=source)


def load_base(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    quantise: QuantiseRules | str | None = None,
    keep_digest: bool = False,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    verify: bool = False,
) -> Base:
    """The base in a Hugging Face directory, or in one that `save_base` wrote.

    dtype, param_dtype: as in ModelConfig; by default the weights stay as stored and are computed with in that dtype.
    quantise: as in ModelConfig; weights are rounded one after the other while they are read. The digest is then another
    one, since adapters learn what the base they see lacks; with keep_digest it stays, and adapters that were made for
    the base before it was quantised are taken. mesh: where given, each device has its own shard only, and all
    processes of the mesh load together. rules: the model's, by default popax.sharding's. verify: hash the files of a
    Hugging Face directory even where their hashes are noted beside them. Raises CheckpointError for a directory that is
    neither, or whose weights are damaged or do not fit; ConfigError for a config that popax does not support, and for a
    base that is quantised already, in another way.
    """
    directory, chosen = Path(path), as_rules(quantise)
    if (directory / RECORD).is_file():
        options = {"dtype": dtype, "param_dtype": param_dtype, "quantise": chosen, "keep_digest": keep_digest}
        return _load_saved(directory, **options, mesh=mesh, rules=rules)
    if (directory / hf.CONFIG).is_file():
        config = hf.read_config(directory, dtype=dtype, param_dtype=param_dtype)
        model = Model(dataclasses.replace(config, quantise=chosen), rules or ShardingRules())
        params, digest = hf.open_weights(directory, model).load(mesh=mesh, verify=verify)
        named = digest if chosen is None or keep_digest else digest_quantised(digest, chosen)
        return Base(model=model, params=params, digest=named, source=str(path))
    raise _no_base(directory)


def open_base(path: str | os.PathLike[str]) -> BaseInfo:
    """The base in a directory, whose weights are not loaded: of a Hugging Face directory they are hashed at most.

    Raises what `load_base` raises.
    """
    directory = Path(path)
    if (directory / RECORD).is_file():
        record = _read_record(directory / RECORD)
        model = Model(ModelConfig.from_dict(record["config"]))

        params = functools.cache(lambda: load_base(path).params)
        return BaseInfo(
            model=model,
            digest=record["digest"],
            source=record["source"],
            site_weight=lambda site: model.site_weight(params(), site),
            site_bias=lambda site: model.site_bias(params(), site),
        )
    if (directory / hf.CONFIG).is_file():
        model = Model(hf.read_config(directory))
        weights = hf.open_weights(directory, model)

        def read(site: str) -> np.ndarray:
            return weights.read(f"{EMBED}/embedding" if site == EMBED else model.weight_name(site))

        def read_bias(site: str) -> np.ndarray | None:
            name = "" if site == EMBED else model.weight_name(site).removesuffix("kernel") + "bias"
            return weights.read(name) if name in weights.sources else None

        digest = weights.digest()
        return BaseInfo(model=model, digest=digest, source=str(path), site_weight=read, site_bias=read_bias)
    raise _no_base(directory)


def _no_base(directory: Path) -> CheckpointError:
    state = "holds neither" if directory.is_dir() else "is not a directory with"
    return CheckpointError(f"{directory} {state} {hf.CONFIG} (Hugging Face) nor {RECORD} (popax): no base to load")


def save_base(path: str | os.PathLike[str], base: Base) -> None:
    """Write the base as an Orbax checkpoint with its config and digest; `path` appears only once all of it is there.

    Raises CheckpointError where `path` exists, or the file system refuses to write.
    """
    final = Path(path).absolute()
    if final.exists():
        raise CheckpointError(f"{final} exists already; bases are not overwritten: choose another path or remove it")
    # Processes that save together must agree on the name; those that do not must not meet.
    partial = final.with_name(f".{final.name}.partial-{os.getpid() if jax.process_count() == 1 else 'all'}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / WEIGHTS, base.params, force=True)
        if jax.process_index() == 0:
            record = {"format": FORMAT, "config": base.model.config.to_dict()}
            record |= {"digest": base.digest, "source": base.source}
            (partial / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
            os.rename(partial, final)
    except (OSError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final} was not written: {error}; is there space, and is its parent writable?"
        ) from error


def _load_saved(
    directory: Path,
    *,
    dtype: str | None,
    param_dtype: str | None,
    quantise: QuantiseRules | None,
    keep_digest: bool,
    mesh: Mesh | None,
    rules: ShardingRules | None,
) -> Base:
    record = _read_record(directory / RECORD)
    stored = ModelConfig.from_dict(record["config"])
    # As with a Hugging Face directory, the compute type follows a param_dtype that is asked for.
    chosen = {"dtype": dtype or param_dtype or stored.dtype, "param_dtype": param_dtype or stored.param_dtype}
    model = Model(dataclasses.replace(stored, **chosen), rules or ShardingRules())
    rounding = quantise is not None and quantise != stored.quantise
    if rounding and stored.quantise is not None:
        raise ConfigError(
            f"{directory} is quantised already, by {stored.quantise}, and is not rounded again to {quantise}: load the "
            "base that it was made from"
        )
    target = _placed(model, mesh)
    try:
        weights = directory.absolute() / WEIGHTS
        with ocp.StandardCheckpointer() as checkpointer:
            _check_stored(checkpointer.metadata(weights).item_metadata, target, weights)
            params = {} if rounding else checkpointer.restore(weights, target)
        if rounding:
            model = dataclasses.replace(model, config=dataclasses.replace(model.config, quantise=quantise))
            params = _restore_rounded(weights, target, model, _placed(model, mesh))
    except PopaxError:
        raise
    except Exception as error:  # Orbax passes a damaged array on as a plain Exception, with pages of specification
        cause = str(error).partition("\n")[0][:300]
        raise CheckpointError(f"{directory}: the weights cannot be read: {cause}; copy the base again") from error
    digest = record["digest"]
    if quantise is not None and rounding and not keep_digest:
        digest = digest_quantised(digest, quantise)
    return Base(model=model, params=params, digest=digest, source=record["source"])


def _placed(model: Model, mesh: Mesh | None) -> Params:
    """`Model.abstract` with shardings. Always said: left out, Orbax looks for the devices that saved the weights."""
    alone = SingleDeviceSharding(jnp.zeros(()).device)
    target = model.abstract()
    shardings = jax.tree.map(lambda _: alone, target) if mesh is None else model.shardings(mesh)
    return jax.tree.map(_with_sharding, target, shardings)


def _restore_rounded(weights: Path, stored: Params, model: Model, wanted: Params) -> Params:
    """The parameters of a quantised model from those that were stored in full; one of them is in memory at a time."""
    names, target, params = flatten_named(stored), flatten_named(wanted), {}
    nothing = dict.fromkeys(names, ocp.PLACEHOLDER)
    with ocp.PyTreeCheckpointer() as checkpointer:
        for name, like in names.items():
            item = unflatten_named({**nothing, name: like})
            arguments = ocp.checkpoint_utils.construct_restore_args(item)
            restored = checkpointer.restore(weights, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments))
            leaf = flatten_named(restored)[name]
            if name in target:
                params[name] = leaf
                continue
            parts = (name + VALUES, name + SCALES)
            round_leaf = functools.partial(round_weight, rule=model.quantise_rule(name))
            shardings = Quantised(*(target[part].sharding for part in parts))
            params |= zip(parts, jax.jit(round_leaf, out_shardings=shardings)(leaf), strict=True)
    return unflatten_named(params)


def _check_stored(metadata: Any, target: Params, weights: Path) -> None:
    if metadata is None:
        raise CheckpointError(f"{weights} is no Orbax checkpoint; copy the base again")
    stored = {name: tuple(leaf.shape) for name, leaf in flatten_named(metadata.tree).items()}
    wanted = {name: leaf.shape for name, leaf in flatten_named(target).items()}
    if stored != wanted:
        names = [name for name in sorted(stored | wanted) if stored.get(name) != wanted.get(name)]
        differ = ", ".join(f"{name} is {stored.get(name)}, not {wanted.get(name)}" for name in names[:5])
        raise CheckpointError(f"{weights} does not fit the config beside it: {differ}; copy the base again")


def _with_sharding(like: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"format", "config", "digest", "source"} - set(record)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy the base again") from error
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; copy the base again")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {record['format']}, this popax reads {FORMAT}; upgrade popax")
    return record

"""gin at the door: library classes become configurable here, and the library never imports gin.

A command adds the two flags with `add_arguments`, opens the door once its arguments are parsed, and asks it for
configured objects: `door = open_door(args); model = door.build(ModelConfig)`.
"""

import argparse
import contextlib
import importlib
import importlib.resources
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import gin
import gin.config

import popax
from popax.atomic import write_text
from popax.errors import ConfigError, PopaxError

T = TypeVar("T")
# What a benchmark is of where nothing else is asked for.
BENCH_MODEL, BENCH_SERVE = "models/bench_25m.gin", "runs/bench_serve.gin"

# What gin files may set, by its short name: `AdapterConfig.rank = 8`, `TrainConfig.optimizer = @adamw()`.
CONFIGURABLES: tuple[str, ...] = (
    "popax.modeling.config:ModelConfig",
    "popax.modeling.config:LinearRope",
    "popax.modeling.config:Llama3Rope",
    "popax.modeling.config:YarnRope",
    "popax.modeling.quantise_rules:QuantiseRule",
    "popax.modeling.quantise_rules:QuantiseRules",
    "popax.modeling.block_config:MoEConfig",
    "popax.modeling.block_config:MLAConfig",
    "popax.adapters.base:AdapterConfig",
    "popax.adapters.base:TargetRule",
    "popax.data.pipeline:PipelineConfig",
    "popax.data.records:Columns",
    "popax.population.early_stop:EarlyStop",
    "popax.population.optimizer:adamw",
    "popax.population.optimizer:sgd",
    "popax.population.optimizer:lion",
    "popax.population.optimizer:constant",
    "popax.population.optimizer:warmup_constant",
    "popax.population.optimizer:warmup_cosine",
    "popax.training.config:CohortRule",
    "popax.training.config:TrainConfig",
    "popax.training.pretrain:PretrainConfig",
    "popax.evaluation.columns:EvalConfig",
    "popax.evaluation.gate:GateConfig",
    "popax.serving.sampling:Sampling",
    "popax.serving.config:ServeConfig",
    "popax.serving.programs:EngineShapes",
    "popax.bench.quantised:BenchQuantisedConfig",
    "popax.bench.load:BenchLoadConfig",
    "popax.bench.catalog.config:BenchCatalogConfig",
    "popax.bench.residency:BenchResidencyConfig",
    "popax.bench.compression:BenchCompressionConfig",
    "popax.bench.serve.config:BenchServeConfig",
    "popax.bench.serve.soak:BenchSoakConfig",
    "popax.bench.curve.config:CurveConfig",
    "popax.bench.mixing:MixingConfig",
    "popax.bench.nightly.config:NightlyConfig",
    "popax.population.mixing:CEMConfig",
    "popax.bench.train:BenchTrainConfig",
    "popax.demo.config:DemoConfig",
    "popax.plan.config:PlanConfig",
    "popax.plan.config:MeshShape",
)
# Keys of older gin files, and what they are called now.
RENAMED = {"TrainConfig.keep_optimizer": "TrainConfig.save_optimizer_state"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--gin_file and --gin_param, both repeatable; a later one wins over an earlier one, a param over every file."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file: a path, or a name inside popax's own configs, such as configs/models/bench_25m.gin",
    )
    group.add_argument(
        "--gin_param",
        action="append",
        default=[],
        metavar="'CLASS.KEY=VALUE'",
        help="one binding, such as 'AdapterConfig.rank=4'",
    )


def open_door(
    args: argparse.Namespace, configurables: Iterable[str] = CONFIGURABLES, *, model: str | None = None
) -> "GinDoor":
    """Parse what the flags of `add_arguments` name. Raises ConfigError on a file, class or key that does not exist.

    model: the gin file of the model that a command takes where these name none.
    """
    door = GinDoor(args.gin_file, args.gin_param, configurables)
    if model is None or _sets_a_model():
        return door
    return GinDoor([model, *args.gin_file], args.gin_param, configurables)


def _sets_a_model() -> bool:
    try:
        gin.query_parameter("ModelConfig.vocab_size")
    except ValueError:
        return False
    return True


class GinDoor:
    """One command's configuration. gin itself keeps one per process: opening a door forgets the one before."""

    def __init__(self, files: Iterable[str], params: Iterable[str], configurables: Iterable[str] = CONFIGURABLES):
        gin.clear_config()
        for reference in configurables:
            _register(reference)
        paths = [find_gin_file(name) for name in files]
        with _search_path():
            _parse(paths, [_renamed(param) for param in params])

    def build(self, target: Callable[..., T], *, scope: str | None = None, **overrides: Any) -> T:
        """target(**bindings, **overrides); overrides win.

        Raises ConfigError where a required key has no value, or the class refuses one.
        """
        try:
            configurable = gin.get_configurable(target)
        except ValueError as error:
            name = getattr(target, "__qualname__", target)
            raise ConfigError(f"{name} cannot be set by gin; add it to popax.cli.gin_door.CONFIGURABLES") from error
        try:
            with gin.config_scope(scope):
                return configurable(**overrides)
        except PopaxError as error:
            raise _original(error) from None
        except TypeError as error:
            raise ConfigError(_missing_keys(error) or f"gin: {_one_line(error)}") from error

    def operative(self) -> str:
        """Every value that objects built so far took, defaults included, as a gin file."""
        return gin.operative_config_str()

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `operative.gin` into the run's directory; running with it again gives the same configuration."""
        path = Path(directory) / "operative.gin"
        write_text(path, f"# popax {popax.__version__}\n{self.operative()}")
        return path


def find_gin_file(name: str) -> str:
    """The file itself, or the one of that name inside the installed `popax.configs`, with or without `configs/`."""
    if os.path.isfile(name):
        return name
    for folder in _config_folders():
        path = folder / name
        if path.is_file():
            return str(path)
    inside = _config_folders()[-1]
    known = sorted(path.relative_to(inside).as_posix() for path in inside.rglob("*.gin"))
    raise ConfigError(f"--gin_file {name!r} is neither a file nor one of popax's: {', '.join(known) or 'none'}")


def _config_folders() -> tuple[Path, Path]:
    # The parent too, not resolved through the checkout's symlink, so that `configs/...` means the same everywhere.
    inside = Path(str(importlib.resources.files("popax.configs")))
    package = Path(str(importlib.resources.files("popax")))
    return package, inside


@contextlib.contextmanager
def _search_path() -> Iterator[None]:
    """`include 'configs/models/x.gin'` inside a gin file finds the file of that path, else popax's own.

    gin has no public way to take a folder back. Its other reader, of resources in Python packages, is left out: it
    fails on a folder without `__init__.py`, such as our configs seen from the checkout's root.
    """
    prefixes, readers = gin.config._LOCATION_PREFIXES, cast(list[Any], gin.config._FILE_READERS)
    before = list(prefixes), list(readers)
    prefixes[:] = ["", *map(str, _config_folders())]
    readers[:] = [(_open_renamed, os.path.isfile)]
    try:
        yield
    finally:
        prefixes[:], readers[:] = before


class _Named(io.StringIO):
    """A text as the file of this name, which gin's errors say."""

    name: str


def _open_renamed(path: str) -> _Named:
    """The file's text, with today's keys."""
    with open(path, encoding="utf-8") as file:
        text = _Named(_renamed(file.read()))
    text.name = path
    return text


def _renamed(text: str) -> str:
    for old, new in RENAMED.items():
        if re.search(rf"\b{re.escape(old)}\b", text):
            print(f"gin: {old} is {new} now", file=sys.stderr)
            text = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return text


def _register(reference: str) -> None:
    module_name, _, name = reference.partition(":")
    target = getattr(importlib.import_module(module_name), name)
    try:
        gin.get_configurable(target)
    except ValueError:
        gin.external_configurable(target, name=name, module=module_name)


def _parse(paths: list[str], params: list[str]) -> None:
    try:
        gin.parse_config_files_and_bindings(paths, params)
    except SyntaxError as error:
        where = f"{error.filename or '--gin_param'}, line {error.lineno}: {(error.text or '').strip()}"
        raise ConfigError(f"not gin syntax: {error.msg.splitlines()[0]} ({where})") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"gin: {_one_line(error)}{_hint(str(error))}") from error


def _hint(message: str) -> str:
    """What could have been meant: the configurable names, or the keys of the one that was named."""
    unknown_key = re.search(r"'([\w.]+)'.* doesn't have a parameter named '(\w+)'", message)
    if unknown_key:
        target = gin.get_configurable(unknown_key.group(1))
        return f"; its keys are {', '.join(_keys(target))}"
    if "No configurable matching" in message:
        return f"; known are {', '.join(reference.partition(':')[2] for reference in CONFIGURABLES)}"
    return ""


def _keys(target: Callable[..., Any]) -> list[str]:
    # gin registers a class as a subclass of it whose call takes anything.
    return list(inspect.signature(target.__bases__[0] if inspect.isclass(target) else target).parameters)


def _missing_keys(error: TypeError) -> str | None:
    """`ModelConfig.__init__() missing 1 required keyword-only argument: 'vocab_size'` -> what to do about it."""
    match = re.match(r"(\w+)(?:\.__init__)?\(\) missing \d+ required [\w-]+ arguments?: (.*)", str(error))
    if match is None:
        return None
    owner, keys = match.group(1), re.findall(r"'(\w+)'", match.group(2))
    names = ", ".join(f"{owner}.{key}" for key in keys)
    return f"{names} has no value: set it in a --gin_file, or with --gin_param '{owner}.{keys[0]}=...'"


def _original(error: PopaxError) -> PopaxError:
    """The library's own error: gin raises a proxy whose text ends in the bindings that led to it."""
    inner = error
    while not inner.args and isinstance(inner.__context__, PopaxError):
        inner = inner.__context__
    return inner


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

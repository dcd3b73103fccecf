"""`popax serve`: a population behind the HTTP API that everyone's clients speak."""

import argparse
import ipaddress
import sys
from pathlib import Path

from popax.cli.base import add_base, base_of
from popax.cli.gin_door import add_arguments, open_door
from popax.cli.keys import add_trust, trust_of
from popax.cli.users.shared import which

NAME = "serve"
HELP = "Answer an OpenAI-compatible API for every user of a catalog at once: completions, chat, models, adapters."
EXAMPLE = (
    "popax serve --base runs/irc_base/base --catalog runs/irc/catalog --port 8000\n"
    '  curl localhost:8000/v1/completions -d \'{"model": "ada", "prompt": "how do i"}\' -H \'content-type: '
    "application/json'"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_base(parser, "the base that the adapters were made for")
    parser.add_argument("--catalog", metavar="DIR", help="the users' adapters; not needed for the base alone")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and says which")
    parser.add_argument(
        "--keys", metavar="FILE", help="API keys (popax api-key makes them); needed where other machines can ask"
    )
    parser.add_argument(
        "--revision", default="promoted", metavar="WHICH", help="of users named without one: promoted (default), latest"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    parser.add_argument("--name", metavar="TEXT", help="what to call the base (default: its directory)")
    add_arguments(parser)
    add_trust(parser)
    parser.add_argument("--mesh", metavar="AXIS=SIZE,...", help="spread the base over this process's devices: tensor=8")


def run(args: argparse.Namespace) -> int:
    from popax.errors import ConfigError

    if args.keys is None and not _loopback(args.host):
        raise ConfigError(f"--host {args.host} lets other machines ask: give --keys FILE (popax api-key makes one)")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'popax[serve]'") from error
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from popax.data.tokenize import load_tokenizer
    from popax.evaluation.gate import GateConfig
    from popax.serving.config import ServeConfig, described, open_engine
    from popax.serving.http.app import HttpLimits, create_app
    from popax.serving.http.keys import ApiKeys
    from popax.serving.http.server import bind, serve
    from popax.serving.http.service import Service
    from popax.serving.programs import EngineShapes
    from popax.sharding import make_mesh
    from popax.store.catalog import Catalog

    door = open_door(args)
    config, shapes, gate = door.build(ServeConfig), door.build(EngineShapes), door.build(GateConfig)
    keys = None if args.keys is None else ApiKeys.read(args.keys)
    listener = bind(args.host, args.port)
    mesh = make_mesh(args.mesh) if args.mesh else None
    base, tokenizer = base_of(args, mesh), load_tokenizer(args.tokenizer or args.base)
    catalog = Catalog.open(args.catalog, trusted=trust_of(args)) if args.catalog else None
    engine = open_engine(base, tokenizer, catalog, config, shapes, mesh=mesh)
    try:
        engine.start(_say)
        service = Service(
            engine, tokenizer, catalog, default=which(args.revision), name=args.name or Path(args.base).name
        )
        limits = HttpLimits(
            max_body=config.max_body, body_timeout_s=config.body_timeout_s, open_requests=config.open_requests
        )
        app = create_app(service, keys=keys, limits=limits, gate=gate)
        host, port = listener.getsockname()[:2]
        _say(f"ready: http://{host}:{port} ({described(engine)})")
        drained = serve(app, service, listener, drain_s=config.drain_s, say=_say)
        service.close()
    finally:
        engine.close()
        if engine.rooms is not None:
            engine.rooms.close()
    _say("ended" if drained else "ended; some answers were cut off")
    return 0 if drained else 1


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

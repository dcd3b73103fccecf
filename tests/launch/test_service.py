"""The systemd unit runs a command that exists, and waits longer than it drains."""

import configparser
from pathlib import Path

from popax.cli.main import build_parser
from popax.serving.config import ServeConfig

UNIT = Path(__file__).parents[2] / "launch" / "popax-serve.service"


def test_the_unit_runs_popax_serve():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(UNIT.read_text(encoding="utf-8"))
    service = unit["Service"]
    program, *arguments = service["ExecStart"].split()
    assert program.endswith("/bin/popax")
    args = build_parser("serve").parse_args(arguments)
    assert (args.command, args.port, args.keys) == ("serve", 8000, "keys.json")
    assert int(service["TimeoutStopSec"]) > ServeConfig().drain_s
    assert int(service["LimitNOFILE"]) > ServeConfig().open_requests

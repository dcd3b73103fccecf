"""`popax users promote`: a revision that serving follows from now on, if its scores pass the gate."""

import argparse

from popax.cli.gin_door import add_arguments, open_door
from popax.cli.keys import add_trust
from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_revision, add_user, open_catalog, user_line, which, write_json

NAME = "promote"
HELP = "Make serving follow a revision, if the scores that popax eval recorded of it pass the gate (GateConfig)."
EXAMPLE = (
    "popax users promote runs/irc/catalog ada --revision 3\n"
    "  popax users promote runs/irc/catalog ada --gin_param 'GateConfig.min_gain=0.02'"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_user(parser)
    add_revision(parser, "latest")
    add_arguments(parser)
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.evaluation.gate import GateConfig
    from popax.evaluation.promotion import promote

    gate = open_door(args).build(GateConfig)
    record = promote(open_catalog(args, write=True), args.user, which(args.revision), gate)
    write_json(args, record.to_dict())
    print(user_line(record))
    return 0

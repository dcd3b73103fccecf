"""`popax users ...`: a catalog's users and their revisions."""

NAME = "users"
HELP = "A catalog's users: list, history, diff, tag, promote, rollback, delete, gc, verify, and more."
EXAMPLE = "popax users list runs/irc/catalog --prefix a\n  popax users history runs/irc/catalog ada --json history.json"

COMMANDS = {
    "list": "popax.cli.users.list_",
    "history": "popax.cli.users.history",
    "diff": "popax.cli.users.diff",
    "tag": "popax.cli.users.tag",
    "promote": "popax.cli.users.promote",
    "rollback": "popax.cli.users.rollback",
    "delete": "popax.cli.users.delete",
    "prune": "popax.cli.users.prune",
    "tainted": "popax.cli.users.tainted",
    "verify": "popax.cli.users.verify",
    "compress": "popax.cli.users.compress",
    "interference": "popax.cli.users.interference",
    "gc": "popax.cli.users.gc",
    "stat": "popax.cli.users.stat",
    "export": "popax.cli.users.export",
}

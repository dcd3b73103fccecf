"""`popax generate`: text for several users in one batch."""

import argparse
import json
from typing import TYPE_CHECKING

from popax.atomic import write_text
from popax.cli.base import add_base, base_of
from popax.cli.keys import add_trust, trust_of
from popax.cli.main import add_json
from popax.cli.processes import add_processes, open_mesh
from popax.cli.users.shared import which

if TYPE_CHECKING:
    from jax.sharding import Mesh

NAME = "generate"
HELP = "Continue a prompt for several users at once, each with their own adapter."
EXAMPLE = (
    "popax generate --base runs/irc_base/base --catalog runs/irc/catalog --prompt 'how do i' --user ada --user bob@2 "
    "--user base"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_base(parser, "the base that the adapters were made for")
    parser.add_argument("--catalog", metavar="DIR", help="the users' adapters; not needed for the base alone")
    parser.add_argument(
        "--user",
        action="append",
        metavar="WHO",
        help="a user, user@REVISION (a number, latest, promoted, a tag), or base; repeatable, a row of the batch each",
    )
    parser.add_argument(
        "--expert",
        action="append",
        metavar="LABEL=WHO",
        help="instead of --user: the base is asked which of these labels fits a prompt, and that one continues it",
    )
    parser.add_argument(
        "--question",
        metavar="TEMPLATE",
        help="of --expert, with {text} and {labels}; the labels are compared as its continuation",
    )
    parser.add_argument(
        "--revision",
        default="promoted",
        metavar="WHICH",
        help="of users named without one: promoted (default), latest, or a tag",
    )
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="one for all users, or repeated: one each"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help="sample among the K likeliest (0: all)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="sample among the likeliest of mass P")
    parser.add_argument("--seed", type=int, default=0, help="row i samples with seed + i")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    add_trust(parser)
    add_processes(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with open_mesh(args) as mesh:
        return _run(args, mesh)


def _run(args: argparse.Namespace, mesh: "Mesh | None") -> int:
    from popax.data.tokenize import load_tokenizer
    from popax.distributed.group import ProcessGroup
    from popax.errors import ConfigError
    from popax.evaluation.dispatch import QUESTION, by_prompt
    from popax.serving.sampling import Sampling
    from popax.serving.text import generate_text
    from popax.store.catalog import Catalog

    experts = _experts(args)
    users, prompts = args.user or ["base"], args.prompt
    if not experts:
        prompts = prompts * len(users) if len(prompts) == 1 else prompts
        if len(prompts) != len(users):
            raise ConfigError(
                f"{len(prompts)} prompts for {len(users)} users: give one --prompt, or one for each --user"
            )
    named = set(experts.values()) or set(users)
    if args.catalog is None and named != {"base"}:
        raise ConfigError(f"{min(named - {'base'})} needs --catalog DIR, where the adapters are")
    base, tokenizer = base_of(args, mesh), load_tokenizer(args.tokenizer or args.base)
    if experts:
        labels, question = list(experts), args.question or QUESTION
        chosen = [int(by_prompt(base, tokenizer, text, labels, question).argmax()) for text in prompts]
        users = [experts[labels[at]] for at in chosen]
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    rows = generate_text(
        base,
        tokenizer,
        Catalog.open(args.catalog, read_only=True, trusted=trust_of(args)) if args.catalog else None,
        users,
        prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
        mesh=mesh,
        revision=which(args.revision),
    )
    if not ProcessGroup.current().leads:
        return 0
    if args.json:
        write_text(args.json, json.dumps([row._asdict() for row in rows], indent=2, ensure_ascii=False) + "\n")
    for row in rows:
        print(f"[{row.name}] {row.prompt}{row.text}")
    return 0


def _experts(args: argparse.Namespace) -> dict[str, str]:
    """Who has which label; {} without --expert."""
    from popax.errors import ConfigError

    if args.question and ("{text}" not in args.question or "{labels}" not in args.question):
        raise ConfigError(f"--question {args.question!r}: it has {{text}} and {{labels}} in it")
    if not args.expert:
        if args.question:
            raise ConfigError("--question is of --expert: give both, or neither")
        return {}
    if args.user:
        raise ConfigError("--user says who continues a prompt, --expert asks the base for it: give one of them")
    named = dict(expert.partition("=")[::2] for expert in args.expert)
    if len(named) < max(2, len(args.expert)) or not all(named.values()):
        raise ConfigError(f"--expert {' '.join(args.expert)}: LABEL=WHO, at least two, and each label once")
    return named

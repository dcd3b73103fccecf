"""Prompts in, text out: the tokenizer around a batch of mixed users."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from popax.data.tokenize import Tokenizer
from popax.modeling.base import Base
from popax.residency import Request, Residency
from popax.serving.generate import generate
from popax.serving.pool import BASE_ONLY, leased, parse_request, residency_for
from popax.serving.sampling import Sampling
from popax.store.catalog import Catalog
from popax.store.pointers import PROMOTED, Which


class GeneratedText(NamedTuple):
    """One row: who wrote it (revision None: the base alone), and whether the end token came."""

    name: str
    revision: int | None
    prompt: str
    text: str
    tokens: list[int]
    ended: bool


def generate_text(
    base: Base,
    tokenizer: Tokenizer,
    catalog: Catalog | None,
    users: Sequence[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    revision: Which = PROMOTED,
    residency: Residency | None = None,
) -> list[GeneratedText]:
    """One batch, a row for each user ("base", "user" or "user@revision") and prompt; row i samples with seed + i.

    revision: of a user who is named without one: by default the one that was promoted, what else there is being a
    candidate.
    catalog: None where every row is the base's. mesh: as in `generate`. residency: of this catalog, where its slots
    outlast the call (default: slots for this call). Errors as `Residency.lease` and `generate`.
    """
    requests = [Request(None) if catalog is None else parse_request(user, catalog, revision) for user in users]
    with contextlib.ExitStack() as stack:
        if residency is None and catalog is not None:
            residency = residency_for(catalog, requests, base.digest)
            stack.callback(residency.close if residency else lambda: None)
        adapt, manifests = stack.enter_context(leased(residency, requests))
        rows = generate(
            base.model,
            base.params,
            [encode_prompt(tokenizer, prompt) for prompt in prompts],
            adapt=adapt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=[(seed + row) % 2**32 for row in range(len(users))],
            end_id=tokenizer.eos_id,
            mesh=mesh,
        )
    return [
        GeneratedText(
            name=manifest.name if manifest else BASE_ONLY,
            revision=manifest.revision if manifest else None,
            prompt=prompt,
            text=tokenizer.decode(row.tokens),
            tokens=[int(token) for token in row.tokens],
            ended=row.ended,
        )
        for manifest, prompt, row in zip(manifests, prompts, rows, strict=True)
    ]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """BOS, where the tokenizer puts one before a document, then the prompt's tokens."""
    ids = [int(token) for token in tokenizer.encode(prompt).ids]
    return [tokenizer.bos_id, *ids] if tokenizer.add_bos and tokenizer.bos_id is not None else ids

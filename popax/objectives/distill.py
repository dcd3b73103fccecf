"""Distillation: a student's next-token distributions drawn to those of a teacher with an adapter of its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.adapters.apply import bind
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.objectives.base import LossSums, Objective, loss_sums
from popax.objectives.chunks import in_chunks
from popax.types import Adapt, AdapterState, Batch, HParams, Params


def pair(student: Params, teacher: Params, teacher_shared: AdapterState) -> Params:
    """What the objective takes as params: both bases, and what the teacher's adapters share."""
    return {"student": student, "teacher": teacher, "teacher_shared": teacher_shared}


class DistillBatch(NamedTuple):
    """One user's batch, and the teacher's adapter of this user; a population's has a leading N on every leaf."""

    batch: Batch
    teacher: AdapterState


def distill(
    student: Model, teacher: Model, teacher_cohort: Cohort, *, chunk: int = 128, remat: Remat = "none"
) -> Objective[DistillBatch]:
    """loss = sum_t w_t KL(p_teacher || p_student at t) / sum_t w_t (Hinton et al., arXiv 1503.02531, at temperature 1).

    The teacher is the old base with the user's old adapter; no gradient reaches it. w_t: 1 at supervised targets.
    LossSums.nll is of the KL. chunk: tokens of a row whose logits exist at a time. Both models read the same tokens:
    raises ConfigError where their vocabularies differ.
    """
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ConfigError(
            f"the teacher has {teacher.config.vocab_size} tokens and the student {student.config.vocab_size}: "
            "distributions over other tokens cannot be compared; re-apply the adapters, or train the users again"
        )

    def objective(
        params: Params, adapt: Adapt, examples: DistillBatch, hparams: HParams | None = None
    ) -> tuple[jax.Array, jax.Array, LossSums]:
        del hparams
        batch, own, old = examples.batch, params["student"], params["teacher"]
        guide = bind(teacher_cohort, examples.teacher, params["teacher_shared"])
        shown_BxTxD = jax.lax.stop_gradient(teacher.batch_hidden(old, batch, adapt=guide))
        x_BxTxD = student.batch_hidden(own, batch, adapt=adapt, remat=remat)

        def divergence(x_BxCxD: jax.Array, shown_BxCxD: jax.Array) -> jax.Array:
            logp_BxCxV = jax.nn.log_softmax(student.logits(own, x_BxCxD, adapt))
            shown_BxCxV = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.logits(old, shown_BxCxD, guide)))
            return jnp.sum(jnp.exp(shown_BxCxV) * (shown_BxCxV - logp_BxCxV), axis=-1)

        sums = loss_sums(in_chunks(divergence, chunk, x_BxTxD, shown_BxTxD), batch)
        return sums.nll, sums.targets, sums

    return objective

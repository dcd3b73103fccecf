"""The objectives that a training run can name. A researcher's own is named "module:name", or given itself."""

from collections.abc import Callable
from typing import Any, cast

from popax.errors import ConfigError
from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.named import is_reference, load_named
from popax.objectives.base import Objective
from popax.objectives.entropy import entropy
from popax.objectives.kl import sft_with_kl
from popax.objectives.sft import sft
from popax.types import Batch

# maker(model, remat=...) -> the objective
ObjectiveMaker = Callable[..., Objective[Batch]]
OBJECTIVES: dict[str, ObjectiveMaker] = {"sft": sft, "sft_with_kl": sft_with_kl, "entropy": entropy}


def check_objective(objective: Any) -> ObjectiveMaker:
    """The maker of an objective: a row of the table, "module:name", or a maker itself. Raises ConfigError on others."""
    maker = objective
    if is_reference(objective):
        maker = load_named(objective, "TrainConfig.objective")
    elif isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ConfigError(
                f"TrainConfig.objective={objective!r}: one of {', '.join(OBJECTIVES)}, or your own as 'module:name'"
            )
        maker = OBJECTIVES[objective]
    if not callable(maker):
        raise ConfigError(
            f"TrainConfig.objective={objective!r}: a function (model, remat=...) that makes an objective "
            "(popax.objectives.base), such as popax.objectives.sft.sft"
        )
    return cast(ObjectiveMaker, maker)


def make_objective(objective: Any, model: Model, *, remat: Remat, penalised: bool) -> Objective[Batch]:
    """The objective of a run on this model. penalised: users have a `kl_weight`, which "sft" then weighs."""
    maker = check_objective(objective)
    return (sft_with_kl if penalised and maker is sft else maker)(model, remat=remat)

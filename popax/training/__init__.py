"""Training: from users' text to revisions in a catalog; and the pretraining of a base."""

from popax.training.config import TrainConfig
from popax.training.report import RunReport
from popax.training.run import train_population

__all__ = ["RunReport", "TrainConfig", "train_population"]

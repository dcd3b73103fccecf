"""popax: one frozen base model, and a population of small per-user adapters beside it."""

__version__ = "0.1.0"

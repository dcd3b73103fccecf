"""Adapters: what one user owns. `base` has the types and the resolution of targets; `table` has the methods."""

"""Evaluation: an adapter's gain on its own user's held-out text, beside the controls that keep it honest."""

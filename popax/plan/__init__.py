"""Ahead-of-time plans: what a step will need on a slice of TPUs that is not attached, asked of the real compiler."""

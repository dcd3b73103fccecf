"""Serving: mixed users in one batch."""

"""Measurements: every number in the documentation is one of these commands' output."""

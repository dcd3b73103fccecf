"""Experiment configurations (gin), one folder a kind."""

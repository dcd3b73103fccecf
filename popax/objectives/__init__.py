"""Objectives: losses written for one user. The population vmaps them."""

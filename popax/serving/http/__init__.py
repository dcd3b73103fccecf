"""The engine behind the HTTP API that everyone's clients speak."""

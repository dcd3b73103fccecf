"""The catalog's numbers: a population built, opened, loaded, audited, extracted, and stored in other ways."""

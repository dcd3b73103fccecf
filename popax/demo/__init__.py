"""The whole road on one machine without a download: the users are the packages of Python's standard library."""

"""Settings of all tests."""

from hypothesis import settings

# The same examples in every run: a red run can be repeated, and a green one means the same everywhere.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")

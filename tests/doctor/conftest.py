"""A base model's folder, as the data's tests have it."""

from tests.data.conftest import base as base

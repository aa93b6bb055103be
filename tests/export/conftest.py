"""Bases and an adapter that several tests read and none changes."""

from pathlib import Path

import pytest

from tests.export.world import ADAPTERS, adapter_on, save_base


@pytest.fixture(scope="session", params=[None, 32], ids=["plain", "latent"])
def either_base(request, tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), latent=request.param)


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(scope="session")
def adapter(plain_base, tmp_path_factory) -> Path:
    return adapter_on(plain_base, tmp_path_factory.mktemp("adapter"), **ADAPTERS["everything"])

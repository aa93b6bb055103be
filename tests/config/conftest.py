from pathlib import Path

import pytest

from tests.config.helpers import Keys, make_world


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """A valid configuration, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path)

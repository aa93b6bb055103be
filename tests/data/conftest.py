from pathlib import Path

import pytest

from tests.data.helpers import write_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder, as far as data goes: a tokenizer whose template has generation marks."""
    folder = write_tokenizer(tmp_path_factory.mktemp("base"))
    (folder / "config.json").write_text('{"model_type": "nemotron_h"}')
    return folder

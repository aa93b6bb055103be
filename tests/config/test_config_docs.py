"""The reference page is current and complete, and every committed configuration loads."""

from pathlib import Path

import pytest

from nemo_ray.config.docs import reference
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config, DatasetSpec, RaySection
from nemo_ray.config.tune_schema import TuneSection
from nemo_ray.tune.load import load_sweep

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_the_committed_page_is_current() -> None:
    page = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m nemo_ray.config.docs docs/config.md"


def test_the_page_has_a_row_with_a_text_for_every_key() -> None:
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    described = {row[0].strip("|` "): row for row in rows if len(row) == 4}
    keys = set(Config.model_fields) - {"ray"} | set(DatasetSpec.model_fields)
    keys |= {f"ray.{key}" for key in RaySection.model_fields}
    assert set(described) == keys | {f"tune.{key}" for key in TuneSection.model_fields}
    for row in described.values():
        assert row[3].rstrip(" |").endswith(".") and len(row[3]) > 12, row


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configs_ask_for_nothing_that_is_refused(path: Path) -> None:
    if path.name.startswith("sweep"):
        assert load_sweep(str(path)).base.notices == ()
    else:
        assert load_config(str(path), check_paths=False).notices == ()

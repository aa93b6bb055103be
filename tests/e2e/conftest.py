"""One world a session: its runs are compared with each other, and each is made once."""

from collections.abc import Iterator

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.compare import assert_loss_falls
from tests.e2e.world import World
from tests.object_store import ObjectStore


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The base, the rows, and the runs over them."""
    made = World(tmp_path_factory.mktemp("e2e"))
    yield made
    made.end()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An object store with a bucket "runs", with its address and keys in this process's environment."""
    with ObjectStore() as made:
        made.create_bucket("runs")
        for name, value in made.environ().items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture(scope="session")
def reference(world: World) -> RunDir:
    """One worker, one micro-batch of 4 packs a step, from beginning to end."""
    run = world.finished("reference")
    assert_loss_falls(run)
    return run

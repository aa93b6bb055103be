"""What differs between the stores behind one client: pyarrow 26 lists no folders of Google Cloud Storage."""

from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from nemo_ray import object_store, storage
from nemo_ray.stored_run import StoredRunDir


class LikeGcs(fs.FileSystemHandler):
    """Files below a folder, told of as pyarrow 26 tells of objects in Google Cloud Storage."""

    def __init__(self, root: Path) -> None:
        self.local = fs.SubTreeFileSystem(str(root), fs.LocalFileSystem())

    def get_type_name(self) -> str:
        return "like-gcs"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        found = self.local.get_file_info(fs.FileSelector(selector.base_dir, True, selector.recursive))
        files = [info for info in found if info.type == fs.FileType.File]
        if not files and self.local.get_file_info(selector.base_dir).type == fs.FileType.NotFound:
            raise OSError(f"No such file or directory: {selector.base_dir}")
        return files

    def delete_dir(self, path: str) -> None:
        if self.local.get_file_info(path).type == fs.FileType.NotFound:
            raise OSError(f"No such directory: {path}")
        self.local.delete_dir(path)
        raise FileNotFoundError("the object of the folder itself")  # after all in it is gone

    def delete_file(self, path: str) -> None:
        self.local.delete_file(path)

    def open_input_file(self, path: str) -> Any:
        return self.local.open_input_file(path)

    def open_input_stream(self, path: str) -> Any:
        return self.local.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self.local.create_dir(path.rsplit("/", 1)[0])
        return self.local.open_output_stream(path)

    def _never(self, *_: Any) -> Any:
        raise NotImplementedError

    copy_file = create_dir = delete_dir_contents = delete_root_dir_contents = move = open_append_stream = (
        _never
    )


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    system = fs.PyFileSystem(LikeGcs(tmp_path / "store"))
    monkeypatch.setattr(object_store, "connect", lambda location, large=False: system)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_folders_are_found_by_what_lies_in_them() -> None:
    for name in ("one/a", "one/deep/b", "two/c", "top"):
        storage.publish_bytes(f"gs://bucket/run/{name}", b"x")
    assert storage.list_folders("gs://bucket/run") == {"one", "two"}
    assert storage.list_folders("gs://bucket/run/one/") == {"deep"}
    assert (
        storage.list_names("gs://bucket/run") == {"top"} and storage.list_folders("gs://bucket/none") == set()
    )


def test_a_folder_that_is_gone_is_gone() -> None:
    storage.publish_bytes("gs://bucket/run/one/first", b"x")
    storage.remove_folder("gs://bucket/run/one", first="first")
    storage.remove_folder("gs://bucket/run/one")
    storage.remove_folder("gs://bucket/run/never")
    assert storage.list_files("gs://bucket/run") == []


def test_a_run_finds_its_checkpoints() -> None:
    run = StoredRunDir("gs://bucket/run")
    for step in (5, 10):
        storage.publish_bytes(f"gs://bucket/run/checkpoints/step-{step}/rank-0.safetensors", b"x")
        storage.publish_json(f"gs://bucket/run/checkpoints/step-{step}/state.json", {"step": step})
    storage.publish_json("gs://bucket/run/run.json", {"outcome": "failed"})
    run.pull()
    assert run.checkpoint_steps() == [5, 10] and run.foreign_entries() == []

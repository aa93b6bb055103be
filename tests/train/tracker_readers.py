"""What the trackers' own programs would show: points by name and step, from the files they write."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Points = dict[tuple[str, int], list[float]]
"""(name, step) -> every value that there is."""


def tensorboard_points(folder: Path) -> Points:
    """As TensorBoard reads a folder: files in the order of their names; a start voids what lies at its step
    or later (tensorboard 2.20, EventAccumulator)."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: Points = {}
    for file in sorted(folder.iterdir()):
        for record in _tf_records(file.read_bytes()):
            event = Event.FromString(record)
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {key: values for key, values in found.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


def tensorboard_texts(folder: Path) -> list[str]:
    """The texts in all files."""
    from tensorboardX.proto.event_pb2 import Event

    records = [record for file in sorted(folder.iterdir()) for record in _tf_records(file.read_bytes())]
    values = [value for record in records for value in Event.FromString(record).summary.value]
    return [value.tensor.string_val[0].decode() for value in values if value.tensor.string_val]


def _tf_records(data: bytes) -> Iterator[bytes]:
    """Length (8 bytes), its checksum (4), the record, its checksum (4)."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += 12 + length + 4


def wandb_points(file: Path) -> Points:
    """The history in a `.wandb` file, as `wandb sync` sends it."""
    import json

    found: Points = {}
    for record in _wandb_records(file.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = row["_step"]
            for name, value in row.items():
                if not name.startswith("_"):
                    found.setdefault((name, step), []).append(value)
    return found


def wandb_config(file: Path) -> dict[str, Any]:
    """The configuration that the run was given."""
    import json

    for record in _wandb_records(file.read_bytes()):
        if record.WhichOneof("record_type") == "run":
            return {item.key: json.loads(item.value_json) for item in record.run.config.update}
    raise AssertionError("no run in the file")


def wandb_group(file: Path) -> str:
    """The group that a `.wandb` file's run is in."""
    (group,) = {
        record.run.run_group for record in _wandb_records(file.read_bytes()) if record.HasField("run")
    }
    return str(group)


def _wandb_records(data: bytes) -> Iterator[Any]:
    """A header of 7 bytes, then LevelDB's log: parts of records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, full, first, last = 32768, 1, 2, 4
    at, parts = 7, b""
    while at + 7 <= len(data):
        room = block - at % block
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part = data[at + 7 : at + 7 + length]
        at += 7 + length
        parts = part if kind in (full, first) else parts + part
        if kind in (full, last):
            yield Record.FromString(parts)


def mlflow_points(uri: str, run_id: str) -> Points:
    """The whole history of a run's metrics."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found: Points = {}
    for name in client.get_run(run_id).data.metrics:
        for point in client.get_metric_history(run_id, name):
            found.setdefault((name, point.step), []).append(point.value)
    return found

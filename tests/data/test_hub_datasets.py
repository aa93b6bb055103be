"""Datasets of the hub: which files are taken, what is fetched, what is reused, and what the user is told.

huggingface_hub reads its environment when it is imported, so each case is a process of its own, as in
production: the data command, against a hub on loopback.
"""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.data.card import files_by_split
from nemo_ray.data.manifest import DataPlan, FileInfo, SourceInfo
from nemo_ray.data.shards import read_stats
from nemo_ray.data.window_list import WindowList
from nemo_ray.errors import ConfigError
from nemo_ray.hub import variables_to_pass_on
from nemo_ray.run_dir import RunDir
from nemo_ray.storage import publish_json
from nemo_ray.train import outputs
from tests.data.helpers import chats
from tests.hub_server import HubServer

REPOSITORY = Path(__file__).parents[2]
NAME = "owner/chats"
PLAN = """
import json, sys
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.data.prepare import read_rows, window_task
from nemo_ray.data.sources import plan_data
from nemo_ray.errors import NemoRayError, tell
try:
    config = load_config(sys.argv[1]).config
    plan = plan_data(config.data, config.base_model, sys.argv[2])
except NemoRayError as error:
    sys.exit(tell(error))
assert "torch" not in sys.modules
result = [{"files": [file.path for file in source.files], "rows": [], "keys": []} for source in plan.sources]
for window in plan.windows:
    task = window_task(plan, window, config.data, config.base_model, held_out=False)
    result[window.source]["rows"] += [row["messages"][0]["content"] for row in read_rows(task)]
    result[window.source]["keys"].append(window.key)
print(json.dumps(result))
"""


def parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=37)
    return sink.getvalue()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = chats(60)
QUESTIONS = [row["messages"][0]["content"] for row in ROWS]
FILES = {
    "README.md": b"# Chats",
    "data/train-00000-of-00002.parquet": parquet(ROWS[:25]),
    "data/train-00001-of-00002.parquet": parquet(ROWS[25:50]),
    "data/test-00000-of-00001.parquet": parquet(ROWS[50:]),
    "setup.py": b"raise SystemExit('code of a dataset was run')",
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(f"datasets/{NAME}", FILES)
        yield server


def command(
    hub: HubServer, base: Path, tmp_path: Path, *arguments: str, datasets: Any = ({},), **variables: str
) -> "subprocess.CompletedProcess[str]":
    entries = [{"path": NAME, **dataset} for dataset in datasets]
    config = {"base_model": str(base), "datasets": entries, "sequence_len": 128}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": str(tmp_path / "out")}))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_"))}
    environ = {
        **kept,
        **hub.environ(tmp_path / "home"),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environ, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def planned(hub: HubServer, base: Path, tmp_path: Path, *datasets: Any, **variables: str) -> Any:
    """What each of the datasets gives."""
    arguments = ["-c", PLAN, "config.yaml", str(tmp_path / "out")]
    done = command(hub, base, tmp_path, *arguments, datasets=datasets or ({},), **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refused(hub: HubServer, base: Path, tmp_path: Path, dataset: Any, **variables: str) -> str:
    arguments = ["-m", "nemo_ray.data", "config.yaml", "--show", "1"]
    done = command(hub, base, tmp_path, *arguments, datasets=[dataset], **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


# -- what is taken and fetched --------------------------------------------------------------------


def test_the_train_split_is_fetched_once_and_read_with_our_windows(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    commit = next(iter(hub.repositories[f"datasets/{NAME}"].commits))
    (first,) = planned(hub, base, tmp_path)
    assert first["rows"] == QUESTIONS[:50]
    assert first["files"] == [
        f"hub://datasets/{NAME}@{commit}/data/train-0000{i}-of-00002.parquet" for i in (0, 1)
    ]
    assert {request.file for request in hub.requests if request.storage} == {
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    }
    assert not hub.transfers("setup.py")
    hub.requests.clear()
    assert planned(hub, base, tmp_path) == [first]
    assert not [request for request in hub.requests if request.storage], "nothing is fetched again"
    hub.requests.clear()
    assert planned(hub, base, tmp_path, HF_HUB_OFFLINE="1") == [first]
    assert not hub.requests


def test_splits_slices_files_and_revisions(hub: HubServer, base: Path, tmp_path: Path) -> None:
    old = next(iter(hub.repositories[f"datasets/{NAME}"].commits))
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"split": "train[:20%]"}, QUESTIONS[:10]),
        ({"split": "test"}, QUESTIONS[50:]),
        ({"data_files": "data/train-*1-of-*.parquet"}, QUESTIONS[25:50]),
    ]
    hub.add(f"datasets/{NAME}", {"train.jsonl": lines(ROWS[:5])})
    cases = [({"revision": old, **dataset}, wanted) for dataset, wanted in cases]
    cases += [({}, QUESTIONS[:5]), ({"revision": old}, QUESTIONS[:50])]
    results = planned(hub, base, tmp_path, *(dataset for dataset, _ in cases))
    for (dataset, wanted), result in zip(cases, results, strict=True):
        assert result["rows"] == wanted, dataset


def test_a_file_more_in_a_later_commit_leaves_the_windows_of_the_others(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    files = {f"train_{i}.jsonl": lines(chats(200, seed=i)) for i in range(2)}
    hub.add(f"datasets/{NAME}", files)
    (before,) = planned(hub, base, tmp_path)
    hub.add(f"datasets/{NAME}", {**files, "train_0a.jsonl": lines(chats(200, seed=7))})
    (after,) = planned(hub, base, tmp_path)
    assert len(after["keys"]) == len(before["keys"]) + 1 and set(before["keys"]) < set(after["keys"])


def test_the_card_says_which_files_a_configuration_has(hub: HubServer, base: Path, tmp_path: Path) -> None:
    card = {
        "configs": [
            {"config_name": "en", "data_files": [{"split": "train", "path": ["part_a/*", "more.jsonl"]}]},
            {"config_name": "fr", "data_files": "part_b/*"},
        ]
    }
    hub.add(
        f"datasets/{NAME}",
        {
            "README.md": b"---\n" + yaml.safe_dump(card).encode() + b"---\nText",
            "part_a/1.jsonl": lines(ROWS[:10]),
            "more.jsonl": lines(ROWS[10:20]),
            "part_b/x.parquet": parquet(ROWS[20:30]),
        },
    )
    english, french = planned(hub, base, tmp_path, {"name": "en"}, {"name": "fr"})
    assert (english["rows"], french["rows"]) == (QUESTIONS[:20], QUESTIONS[20:30])
    assert refused(hub, base, tmp_path, {}) == (
        f"datasets[0].name: missing; {NAME} has the configurations en, fr"
    )
    assert "has no configuration 'fre'; did you mean 'fr'?" in refused(hub, base, tmp_path, {"name": "fre"})


def test_a_node_without_a_copy_fetches_its_file(hub: HubServer, base: Path, tmp_path: Path) -> None:
    """A data task elsewhere has the reference only."""
    reference = planned(hub, base, tmp_path)[0]["files"][1]
    read = (
        "import sys; from nemo_ray.data.files import read_span; from nemo_ray.data.window_list import Span; "
    )
    read += "print(len(read_span(sys.argv[1], 'parquet', Span(0, 0, 1, 0, 25), ['messages'])))"
    hub.requests.clear()
    done = command(hub, base, tmp_path, "-c", read, reference, HF_HOME=str(tmp_path / "other"))
    assert done.stdout == "25\n", done.stderr
    assert {request.file for request in hub.requests if request.storage} == {
        "data/train-00001-of-00002.parquet"
    }


def test_a_broken_download_goes_on_where_it_ended(hub: HubServer, base: Path, tmp_path: Path) -> None:
    name = "data/train-00000-of-00002.parquet"
    rows = [{"messages": row["messages"], "noise": os.urandom(600_000)} for row in ROWS[:25]]
    hub.add(f"datasets/{NAME}", {name: parquet(rows)})
    hub.cut_after[name] = 12 << 20  # more than the 10 MiB in which huggingface_hub hands bytes on
    assert planned(hub, base, tmp_path)[0]["rows"] == QUESTIONS[:25]
    ranges = [request.range for request in hub.transfers(name)]
    assert len(ranges) == 2 and ranges[1] is not None


# -- streaming ------------------------------------------------------------------------------------


def test_what_is_streamed_has_the_same_windows_and_leaves_no_copy(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    files = {**FILES, "rows.jsonl": lines(ROWS), "rows.jsonl.gz": gzip.compress(lines(ROWS))}
    hub.add(f"datasets/{NAME}", files)
    commit = list(hub.repositories[f"datasets/{NAME}"].commits)[-1]
    entries = [{}, {"split": "train[10:20]"}, {"data_files": "rows.jsonl"}, {"data_files": "rows.jsonl.gz"}]
    streamed = planned(hub, base, tmp_path, *({**entry, "streaming": True} for entry in entries))
    assert [result["rows"] for result in streamed] == [QUESTIONS[:50], QUESTIONS[10:20], QUESTIONS, QUESTIONS]
    assert streamed[0]["files"][0] == f"hf://datasets/{NAME}@{commit}/data/train-00000-of-00002.parquet"
    kept = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [name for name in kept if "train" in name or "rows" in name], kept
    assert all(request.range for request in hub.requests if request.storage and request.method == "GET")
    fetched = planned(hub, base, tmp_path, *entries)
    tables_and_packed = (0, 1, 3)  # lines that lie here are known by their content, not by the hub's digest
    assert all(streamed[i]["keys"] == fetched[i]["keys"] for i in tables_and_packed)
    hub.requests.clear()
    planned(hub, base, tmp_path, {"streaming": True}, HF_HUB_OFFLINE="1")
    assert not hub.requests, "what is here is read here"


def test_of_a_large_parquet_file_only_what_is_read_is_transferred(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    rows = [{"messages": row["messages"], "noise": os.urandom(1_000_000)} for row in ROWS]
    content = parquet(rows)  # of 60 MB, most of them in a column that nothing reads
    hub.add(f"datasets/{NAME}", {"train.parquet": content})
    (found,) = planned(hub, base, tmp_path, {"streaming": True})
    assert found["rows"] == QUESTIONS
    asked = [request.range.removeprefix("bytes=").split("-") for request in hub.transfers("train.parquet")]
    assert 0 < sum(int(last) - int(first) + 1 for first, last in asked) < len(content) / 2


def test_a_range_is_asked_for_again_and_the_token_stays_with_the_hub(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    name = "train.parquet"
    hub.add(f"datasets/{NAME}", {"README.md": b"# Chats", name: parquet(ROWS)}, access="gated")
    line = refused(hub, base, tmp_path, {"streaming": True})
    assert line.startswith("datasets[0].path: owner/chats is gated; accept the licence on http")
    hub.refusals[name], hub.cut_after[name] = 2, 0
    (found,) = planned(hub, base, tmp_path, {"streaming": True}, HF_TOKEN="hf_right")
    assert found["rows"] == QUESTIONS and not hub.refusals[name] and name not in hub.cut_after
    assert all(request.authorization is None for request in hub.requests if request.storage)


def test_a_hub_that_sends_no_ranges_is_told(hub: HubServer, base: Path, tmp_path: Path) -> None:
    hub.ranges = False
    line = refused(hub, base, tmp_path, {"streaming": True})
    assert "owner/chats cannot be streamed: the hub, or a proxy before it, sends no parts of files" in line


@pytest.mark.e2e
@pytest.mark.long
def test_the_command_streams_through_ray(hub: HubServer, base: Path, tmp_path: Path) -> None:
    hub.add(f"datasets/{NAME}", {**FILES, "rows.jsonl": lines(ROWS)})
    datasets = [{"streaming": True}, {"streaming": True, "data_files": "rows.jsonl"}]
    arguments = ["-m", "nemo_ray.data", "config.yaml"]
    done = command(hub, base, tmp_path, *arguments, datasets=datasets, RAY_AUTH_MODE="disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "downloading" not in done.stdout
    shards = [read_stats(str(path)) for path in (tmp_path / "out" / "prepared").glob("*.arrow")]
    assert sum(stats.documents + stats.dropped for stats in shards) == 50 + 60


@pytest.mark.e2e
def test_the_command_prepares_all_kinds_of_sources(hub: HubServer, base: Path, tmp_path: Path) -> None:
    """Through Ray: its tasks take a hub's file from the cache, and a compressed one from its copy."""
    texts = [f'the "fox" number {i},\nand more' for i in range(30)]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *([text] for text in texts)])
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    (tmp_path / "rows.txt").write_text("the quick fox\n" * 20 + "\n")
    arguments = ["-m", "nemo_ray.data", "config.yaml"]
    datasets = [
        {},
        {"path": "rows.csv", "type": "completion"},
        {"path": "rows.jsonl.*"},
        {"path": "rows.txt", "type": "completion", "shards": 3},
    ]
    done = command(hub, base, tmp_path, *arguments, datasets=datasets, RAY_AUTH_MODE="disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "downloading owner/chats" in done.stdout
    assert "note: datasets[2]: 1 compressed file cannot be read in parts" in done.stdout
    shards = [read_stats(str(path)) for path in (tmp_path / "out" / "prepared").glob("*.arrow")]
    assert sum(stats.documents + stats.dropped for stats in shards) == 50 + 30 + 60 + 7
    assert not any(stats.rejected for stats in shards)


# -- what the user is told ------------------------------------------------------------------------


def test_mistakes_name_the_key_and_the_remedy(hub: HubServer, base: Path, tmp_path: Path) -> None:
    hub.add("datasets/owner/script", {"script.py": b"import os", ".gitattributes": b""})
    hub.add("datasets/owner/pictures", {".gitattributes": b"", "a.png": b"x"})
    hub.add("datasets/owner/gated", FILES, access="gated")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"path": "owner/script"},
            "makes its rows by a Python script (script.py), and no code of a dataset is run",
        ),
        (
            {"path": "owner/pictures"},
            "holds no file of JSON lines, JSON, CSV, Parquet, Arrow or text for it; it has .gitattr",
        ),
        ({"path": "owner/none"}, "datasets[0].path: owner/none is no folder here and no dataset at http"),
        ({"path": "owner/gated"}, "datasets[0].path: owner/gated is gated; accept the licence on http"),
        ({"revision": "v9"}, "datasets[0].revision: v9 is no branch, tag or commit of owner/chats; see http"),
        ({"split": "dev"}, "datasets[0].split: owner/chats has no split 'dev'; it has train, test"),
        ({"name": "en"}, "datasets[0].name: owner/chats has one configuration only; remove name (en)"),
        ({"data_files": "x/*.parquet"}, "datasets[0].data_files: x/*.parquet matches no file of owner/chats"),
    ]
    for dataset, part in cases:
        line = refused(hub, base, tmp_path, dataset)
        assert line.startswith("datasets[0].") and part in line, line
    offline = refused(hub, base, tmp_path, {"path": "owner/pictures2"}, HF_HUB_OFFLINE="1")
    assert "hf download owner/pictures2 --repo-type dataset" in offline
    (with_token,) = planned(hub, base, tmp_path, {"path": "owner/gated"}, HF_TOKEN="hf_right")
    assert with_token["rows"] == QUESTIONS[:50]


def test_variables_of_the_hub_are_passed_on_for_datasets_too(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"base_model": str(base), "datasets": [{"path": NAME}]}))
    passed = variables_to_pass_on(load_config(str(path)).config, {"HF_TOKEN": "x", "HOME": "y"})
    assert passed == {"HF_TOKEN": "x"}


def test_a_continued_run_keeps_the_commits_that_it_began_with(base: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    path = tmp_path / "config.yaml"

    def config(**keys: Any) -> Config:
        specs = [{"path": NAME, **keys}, {"path": "owner/more"}]
        path.write_text(yaml.safe_dump({"base_model": str(base), "datasets": specs}))
        return load_config(str(path)).config

    commits = ["a" * 40, "b" * 40]
    files = [
        FileInfo(f"{scheme}://datasets/{name}@{commit}/x.jsonl", "x.jsonl", "", "jsonl", 1, 0)
        for scheme, name, commit in zip(("hub", "hf"), (NAME, "owner/more"), commits, strict=True)
    ]
    sources = tuple(SourceInfo("", "", (file,), 1, 0, 64, 1.0, False) for file in files)
    plan = DataPlan("", "", 128, WindowList(), WindowList(), sources, (), 0)
    start = outputs.Start(run.path / "checkpoints" / "step-1", replace=False)
    assert outputs.keep_dataset_commits(config(), start) == config(), "nothing is known of the run"
    publish_json(run.data_plan_file, plan.to_json())
    run.write_run({"config": config().to_dict()})
    kept = outputs.keep_dataset_commits(config(), start)
    assert [spec.revision for spec in kept.datasets] == commits
    assert outputs.keep_dataset_commits(config(), outputs.Start(None, replace=True)) == config()
    assert outputs.keep_dataset_commits(config(revision="v2"), start) == config(revision="v2")


@pytest.mark.parametrize(
    ("names", "config", "splits"),
    [
        (["a.jsonl", "README.md"], "", {"train": ["a.jsonl"]}),
        (
            ["train/1.csv", "validation/1.csv"],
            "",
            {"train": ["train/1.csv"], "validation": ["validation/1.csv"]},
        ),
        (["x/a.txt", "y/b.txt"], "data_dir: y", {"train": ["y/b.txt"]}),
        (["train.parquet", "x.parquet"], "data_files: x.parquet", {"train": ["x.parquet"]}),
    ],
)
def test_the_hubs_rules_for_splits(names: list[str], config: str, splits: dict[str, list[str]]) -> None:
    card = f"---\nconfigs:\n- config_name: one\n  {config}\n---\n" if config else ""
    assert files_by_split(names, card, None, "datasets[0]", "o/n") == splits


@pytest.mark.parametrize(
    "text", ["../../etc/*", "/etc/*", "https://example.com/x.csv", "hf://datasets/a/b/x.csv"]
)
def test_a_card_names_nothing_outside_its_repository(text: str) -> None:
    card = f"---\nconfigs:\n- config_name: one\n  data_files: {text}\n---\n"
    with pytest.raises(ConfigError, match="names files elsewhere"):
        files_by_split(["a.csv"], card, None, "datasets[0]", "o/n")


def test_a_folder_with_a_card_follows_it(base: Path, tmp_path: Path) -> None:
    from nemo_ray.data.sources import plan_data
    from tests.data.helpers import section, write_lines

    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in "ab"]
    card = f"---\n{yaml.safe_dump({'configs': configs})}---\n"
    for number, name in enumerate("ab"):
        write_lines(tmp_path / "set" / f"{name}.jsonl", ROWS[: 10 + number])
    (tmp_path / "set" / "README.md").write_text(card)
    data = section(tmp_path / "set", dataset={"name": "b"})
    assert plan_data(data, str(base), str(tmp_path / "out")).num_rows == 11
    (tmp_path / "set" / "README.md").unlink()
    with pytest.raises(
        ConfigError, match=r"datasets\[0\].name: .* has no card with configurations; remove b"
    ):
        plan_data(data, str(base), str(tmp_path / "out"))

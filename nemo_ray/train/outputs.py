"""Where a run's files go, whether they may go there, and the facts that run.json records."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_ray.config.schema import Config, DatasetSpec, TrainSection
from nemo_ray.data.manifest import DataPlan
from nemo_ray.errors import ConfigError
from nemo_ray.hub_datasets import reference_of
from nemo_ray.run_dir import STATE_NAME, RunDir, step_of
from nemo_ray.session import JOB_CONFIG_VARIABLE
from nemo_ray.storage import publish_bytes, read_json
from nemo_ray.stored_run import prepared_place
from nemo_ray.train.best import best_of
from nemo_ray.urls import is_url

DEFAULT_STORAGE_PATH = "~/nemo_ray"
_PACKAGES = ("nemo_ray", "ray", "torch", "transformers", "peft", "pyarrow")


def submission_id(environ: Mapping[str, str]) -> str | None:
    """The id of the `ray job submit` that this process is the driver of, or None."""
    try:
        metadata = json.loads(environ[JOB_CONFIG_VARIABLE])["metadata"]
        return str(metadata["job_submission_id"])
    except (KeyError, TypeError, json.JSONDecodeError):
        return None


def resolve_paths(config: Config, job: bool, cwd: Path) -> Config:
    """The configuration with absolute output paths, and input paths that a worker on another node can open.

    Outputs (output_dir, dataset_prepared_path) are relative to `ray.storage_path` in a submitted job, whose
    working directory is a throw-away copy, and to `cwd` elsewhere. Inputs stay as they are in a job, since
    Ray gives every worker its own copy of that working directory; elsewhere they become absolute.
    """
    storage = Path(config.ray.storage_path or DEFAULT_STORAGE_PATH).expanduser()
    base = (cwd / storage) if job else cwd
    output_dir = _absolute_output(config.output_dir, base)
    prepared = config.dataset_prepared_path
    update: dict[str, Any] = {
        "output_dir": output_dir,
        "dataset_prepared_path": _absolute_output(prepared, base)
        if prepared is not None
        else prepared_place(output_dir),
    }
    # What earlier runs wrote is looked for where this one would write it.
    for name in ("lora_model_dir", "resume_from_checkpoint"):
        value = getattr(config, name)
        if value is not None and value != "auto" and not is_url(value):
            update[name] = str(base / value if not (cwd / value).exists() else cwd / value)
    uri = config.mlflow_tracking_uri
    if uri is not None and ":" not in uri and uri != "databricks":  # a folder
        update["mlflow_tracking_uri"] = str(base / uri)
    if not job:
        update["base_model"] = _absolute(config.base_model, cwd)
        update["chat_template"] = _absolute(config.chat_template, cwd)
        update["datasets"] = tuple(_absolute_dataset(spec, cwd) for spec in config.datasets)
        update["test_datasets"] = tuple(_absolute_dataset(spec, cwd) for spec in config.test_datasets)
    return config.model_copy(update=update)


def _absolute_output(path: str, base: Path) -> str:
    return path.rstrip("/") if is_url(path) else os.path.normpath(base / path)


def _absolute(path: str, cwd: Path) -> str:
    """`path` made absolute where it names something; a hub name or a keyword stays as it is."""
    return str(cwd / path) if (cwd / path).exists() else path


def _absolute_dataset(spec: DatasetSpec, cwd: Path) -> DatasetSpec:
    update = {"path": _absolute(spec.path, cwd)}  # data_files lie in that folder
    if spec.chat_template is not None:
        update["chat_template"] = _absolute(spec.chat_template, cwd)
    return spec.model_copy(update=update)


@dataclass(frozen=True)
class Start:
    """How a run begins: from a checkpoint or fresh; `replace`: the run that lies there goes first."""

    checkpoint: Path | None
    replace: bool


def decide_start(run: RunDir, config: Config) -> Start:
    """Whether and how this run may use its directory. Changes nothing.

    Raises: ConfigError where a run or foreign files would be overwritten, or the checkpoint is not there.
    """
    resume = config.resume_from_checkpoint
    if resume == "auto":
        checkpoint = run.newest_checkpoint()
        if checkpoint is not None:
            return Start(checkpoint, replace=False)
        finished = run.adapter_dir.exists() or run.model_dir.exists()
        if run.holds_run() and not finished:
            return Start(None, replace=True)  # broken off before its first checkpoint
    elif resume is not None:
        checkpoint = run.path / resume[len(run.place) + 1 :] if is_url(resume) else Path(resume)
        if not (checkpoint / STATE_NAME).is_file():
            raise ConfigError(f"resume_from_checkpoint: {resume} is no complete checkpoint (no {STATE_NAME})")
        if checkpoint.resolve().parent == run.checkpoints_dir.resolve():
            return Start(checkpoint, replace=False)
        _refuse_a_run(run)
        return Start(checkpoint, replace=False)
    if config.overwrite:
        return Start(None, replace=_may_replace(run))
    _refuse_a_run(run)
    return Start(None, replace=False)


def base_revision(config: Config, start: Start) -> str:
    """The revision of a hub model to train. A continued run keeps the commit that it began with, although the
    branch may have moved, unless the configuration names another model or revision than it did then."""
    if start.checkpoint is None:
        return config.revision_of_model
    began = RunDir(start.checkpoint.parent.parent).read_run()
    keys = ("base_model", "revision_of_model")
    same = all(began.get("config", {}).get(key) == getattr(config, key) for key in keys)
    return (began.get("base_model_commit") if same else None) or config.revision_of_model


def keep_dataset_commits(config: Config, start: Start) -> Config:
    """The same for datasets of the hub: a continued run keeps the commits of its data plan."""
    run = RunDir(start.checkpoint.parent.parent) if start.checkpoint is not None else None
    if run is None or not run.data_plan_file.exists():
        return config
    began = run.read_run().get("config", {})
    sources = iter(DataPlan.from_json(read_json(run.data_plan_file)).sources)
    kept: dict[str, tuple[DatasetSpec, ...]] = {}
    for key, specs in (("datasets", config.datasets), ("test_datasets", config.test_datasets)):
        entries = [(entry["path"], entry.get("revision")) for entry in began.get(key, ())]
        if entries != [(spec.path, spec.revision) for spec in specs]:
            return config
        # The specs first: zip takes one from its first argument before it sees that the second is at its end.
        begun = [reference_of(source.files[0].path) for _, source in zip(specs, sources, strict=False)]
        kept[key] = tuple(
            spec if reference is None else spec.model_copy(update={"revision": reference.commit})
            for spec, reference in zip(specs, begun, strict=True)
        )
    return config.model_copy(update=kept)


def _refuse_a_run(run: RunDir) -> None:
    if run.holds_run():
        raise ConfigError(
            f"output_dir: {run.place} already holds a run; continue it with resume_from_checkpoint=auto, "
            "replace it with overwrite=true, or name another output_dir"
        )
    if run.has_results():
        raise ConfigError(
            f"output_dir: {run.place} holds results that would be overwritten, but no run.json; "
            "name another output_dir"
        )


def _may_replace(run: RunDir) -> bool:
    """True where there is a run to replace. Refuses a folder that is not a run's."""
    if run.holds_run():
        return True
    foreign = run.foreign_entries()
    if foreign or run.has_results():
        shown = ", ".join(foreign[:3]) or "results without a run.json"
        raise ConfigError(
            f"output_dir: {run.place} is not the folder of a run (it holds {shown}), so overwrite=true "
            "leaves it alone; name another output_dir"
        )
    return False


def begin(run: RunDir, start: Start, plan: DataPlan) -> None:
    """Make the directory ready as `decide_start` said, and pin the data plan of a run that begins anew."""
    run.path.mkdir(parents=True, exist_ok=True)
    type(run)(run.place).begin_attempt()  # workers of an earlier driver may be alive: they write no more
    if start.replace:
        run.clear()
    run.clear_stop()
    run.error_file.unlink(missing_ok=True)
    if start.checkpoint is not None and start.checkpoint.resolve().parent == run.checkpoints_dir.resolve():
        # Later checkpoints belong to a course that is now left; a restart must not pick them up.
        complete = run.complete_checkpoints()
        names = [path.name for path in complete]
        for later in complete[names.index(start.checkpoint.name) + 1 :]:
            run.retire_checkpoint(step_of(later), "superseded")
    if start.checkpoint is None or not run.data_plan_file.exists():
        publish_bytes(run.data_plan_file, json.dumps(plan.to_json()).encode())


def check_plan(run: RunDir, plan: DataPlan) -> None:
    """Hold the data plan of a run that is continued against the one that it began with.

    Raises: ConfigError where the data changed since: its order could not be continued exactly.
    """
    if not run.data_plan_file.exists():
        return
    began = DataPlan.from_json(read_json(run.data_plan_file))
    if _identity(began) != _identity(plan):
        raise ConfigError(
            f"resume_from_checkpoint: the data of {run.place} changed since the run began (fingerprint "
            f"{began.fingerprint}, now {plan.fingerprint}); restore its files and data keys, "
            "or start anew in another output_dir"
        )


def check_best(run: RunDir, train: TrainSection, checkpoint: Path) -> None:
    """Raises ConfigError where the run cannot end with its best weights, since they were not kept."""
    if not train.load_best_model_at_end or checkpoint.resolve().parent != run.checkpoints_dir.resolve():
        return
    best = best_of(run.read_metrics(), train, step_of(checkpoint))
    if best.step is not None and best.step not in run.checkpoint_steps():
        raise ConfigError(
            f"load_best_model_at_end: true, but the best evaluation up to {checkpoint.name}, at step "
            f"{best.step}, has no checkpoint in {run.place}; remove the key to go on without it"
        )


def _identity(plan: DataPlan) -> tuple[object, ...]:
    weights = [source.weight for source in plan.sources]
    return plan.fingerprint, plan.windows, plan.eval_windows, weights


def run_facts(
    config: Config, plan: DataPlan, world_size: int, job_id: str | None, commit: str | None = None
) -> dict[str, Any]:
    """What run.json says when a run begins. `config` as asked for; `commit` of a hub model."""
    return {
        "config": config.to_dict(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "git_revision": git_revision(Path.cwd()),
        "base_model_commit": commit,
        "data_fingerprint": plan.fingerprint,
        "world_size": world_size,
        "submission_id": job_id,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record_run(run: RunDir, facts: Mapping[str, Any]) -> None:
    """Write run.json; a continued run keeps what it said before under "earlier", oldest first."""
    before = run.read_run()
    earlier = before.pop("earlier", [])
    if before:
        kept = ("started_at", "ended_at", "outcome", "world_size", "git_revision", "versions")
        kept += ("failures", "error")
        earlier = [*earlier, {name: before[name] for name in kept if name in before}]
    run.write_run({**facts, **({"earlier": earlier} if earlier else {})})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "nemo_ray":  # run from a source tree, as under `ray job submit --working-dir .`
            from nemo_ray import __version__

            return __version__
        return None


def git_revision(folder: Path) -> str | None:
    """The commit that `folder` is on, with "+changes" where tracked files differ; None outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

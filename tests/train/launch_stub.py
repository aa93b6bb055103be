"""A launch with small parts instead of a model and its data.

Used as `python launch_stub.py BEHAVIOUR OUTPUT_DIR [key=value ...]`.
It is a script, so that its functions travel to Ray's workers by value.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

from nemo_ray.config.load import load_config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.window_list import Window, WindowList
from nemo_ray.train.launch import Launch, Parts

NUM_STEPS = 100_000
SHAPE = {
    "model_type": "nemotron_h",
    "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
    "hidden_size": 64,
    "vocab_size": 256,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
}


def write_inputs(folder: Path) -> Path:
    """A configuration whose paths exist."""
    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(SHAPE))
    (folder / "rows.jsonl").write_text('{"messages": []}\n')
    config = folder / "run.yaml"
    config.write_text(
        f"base_model: {folder / 'base'}\nadapter: lora\nlora_target_modules: [q_proj]\n"
        f"max_steps: {NUM_STEPS}\ndatasets:\n  - path: {folder / 'rows.jsonl'}\nray:\n  num_workers: 2\n"
    )
    return config


class StubPlan(DataPlan):
    def estimated_tokens(self, windows):
        return 100.0

    def __setstate__(self, state):
        """Ray 2.60 unpickles it in a worker twice: the second time when it hands it its function."""
        self.__dict__.update(state)
        times = int(os.environ.get("STUB_UNPICKLED", "0")) + 1
        os.environ["STUB_UNPICKLED"] = str(times)
        dies = os.environ["STUB_BEHAVIOUR"] == "dies when asked" and times == 2 and in_a_worker()
        if dies and first_time(Path(self.directory).with_name("died")):
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_worker():
    """Rather than in Ray Train's controller, which reserves nothing."""
    import ray

    return "CPU" in ray.get_runtime_context().get_assigned_resources()


def first_time(mark: Path) -> bool:
    """Whether no process was here before."""
    with contextlib.suppress(FileExistsError):
        mark.touch(exist_ok=False)
        return True
    return False


def prepare(plan, config, stop, progress):
    progress(0, 1)
    if os.environ.get("STUB_DATA_FAILS"):
        from nemo_ray.errors import DataError

        raise DataError("rows.jsonl: every row was rejected")
    progress(1, 1)


def worker(loop_config):
    """Counts steps until it is told to stop, or fails as BEHAVIOUR says."""
    import ray.train
    import torch.distributed as dist

    from nemo_ray.errors import PatchError
    from nemo_ray.run_dir import RunDir

    run = RunDir(loop_config["output_dir"])
    behaviour = os.environ["STUB_BEHAVIOUR"]
    rank = ray.train.get_context().get_world_rank()
    if behaviour == "dies at once" and rank == 1 and first_time(run.path / "died"):
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    if behaviour == "hangs":
        return hang_once(loop_config, run, rank)
    if behaviour == "dies" and rank == 1:
        time.sleep(5)  # Ray 2.60 ends a run whose worker dies while the controller still starts the others
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "ours" and rank == 1:
        raise PatchError("the self-test failed: document B moved by 0.5")
    if behaviour == "no room":
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file")
    if behaviour == "crash":
        raise ValueError("shapes differ\nand a second line")
    first = rank == 0
    if first:
        run.update_run({"model": {"total": 1000, "trainable": 10}})
        run.append_metrics({"step": 0, "eval_loss": 4.0})
    steps = 20 if behaviour in ("finish", "dies at once", "dies when asked") else NUM_STEPS
    for step in range(1, steps + 1):
        time.sleep(0.02)
        if first:
            row = {"loss": 4.0 - step / steps, "lr": 1e-4, "tokens_per_s": 1234.5, "nonfinite_steps": 0}
            run.append_metrics({"step": step, **row})
            run.write_progress({"phase": "training", "step": step, "max_steps": steps, "eta_s": 3.0, **row})
        if run.stop_requested():
            if behaviour == "deaf":
                continue
            if first:
                folder = run.checkpoint_dir(step)
                folder.mkdir(parents=True)
                (folder / "state.json").write_text("{}")
            return {"step": step, "stopped": True}
    if first:
        run.append_metrics({"step": steps, "eval_loss": 3.0})
        for stage in ("before", "after"):
            row = {"prompt": "What is it?", "completion": f"It is {stage}.", "stage": stage}
            run.append_completion({**row, "step": 0})
        run.adapter_dir.mkdir()
        run.write_progress({"phase": "done", "step": steps, "max_steps": steps})
    return {"step": steps, "stopped": False}


def hang_once(loop_config, run, rank):
    """Rank 1 hangs after step 3, in C and with the interpreter's lock; the next workers find a checkpoint."""
    import ctypes

    import torch.distributed as dist

    from nemo_ray.train.watchdog import Watchdog

    first_attempt = run.newest_checkpoint() is None
    dist.barrier()  # rank 0 writes one below
    if first_attempt:
        with Watchdog(run.rank_file(rank), rank, loop_config["config"].ray.hang_timeout_s) as watchdog:
            if rank == 0:
                run.write_progress({"phase": "training", "step": 3})
                folder = run.checkpoint_dir(2)
                folder.mkdir(parents=True)
                (folder / "state.json").write_text("{}")
            dist.barrier()
            watchdog.enter("training", 3)
            if rank == 1:
                ctypes.PyDLL(None).sleep(300)
            watchdog.wait()
            dist.barrier()
    if rank == 0:
        run.append_metrics({"step": 4, "loss": 3.0, "nonfinite_steps": 0})
        run.adapter_dir.mkdir()
        run.write_progress({"phase": "done", "step": 4})
    return {"step": 4, "stopped": False}


def main() -> int:
    behaviour, output_dir = sys.argv[1], Path(sys.argv[2])
    os.environ["STUB_BEHAVIOUR"] = behaviour  # a local Ray's workers inherit it
    config = write_inputs(output_dir.parent / "inputs")
    loaded = load_config(str(config), [f"output_dir={output_dir}", *sys.argv[3:]])

    def plan(data, base_model, directory):
        windows = WindowList([Window(0, (), 1, "key")])
        return StubPlan(directory, "f00d", data.sequence_len, windows, WindowList(), (), (), 0)

    return Launch(loaded, Parts(plan=plan, prepare=prepare, worker=worker)).run()


if __name__ == "__main__":
    sys.exit(main())

"""What the keys are: types, defaults and what each one does here.

Owns the shape of a resolved configuration. Reading files is load.py's, rules between keys are checks.py's,
axolotl keys that mean nothing here are axolotl.py's.
"""

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field

from nemo_ray.config.kinds import (
    AlphaPattern,
    Arguments,
    Bool,
    Epochs,
    FailureCount,
    Fraction,
    HeldOut,
    Kind,
    Mapping,
    Metric,
    ModuleList,
    NonNegative,
    NonNegativeInt,
    PackLength,
    PathList,
    PathText,
    Positive,
    PositiveInt,
    RankPattern,
    Ratio,
    Resources,
    RolesMap,
    Seed,
    Text,
    TextList,
    Workers,
)

SectionT = TypeVar("SectionT", bound="Section")


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """Which base model, and in what precision and memory layout it is held."""

    base_model: PathText = Field(
        description="Folder of the base model (config.json, safetensors weights, tokenizer), or its id on "
        "the Hugging Face hub, `owner/name`: each node downloads it once, into HF_HOME. HF_TOKEN opens gated "
        "and private models."
    )
    revision_of_model: Text = Field(
        "main",
        description="Branch, tag or commit of a hub model. A run keeps the commit that this names when it "
        "begins, also where it is continued later.",
    )
    reinit_weights: Bool = Field(
        False, description="Take the shape from config.json and random weights; for benchmarks and dry runs."
    )
    load_in_4bit: Bool = Field(
        False, description="Hold the frozen base in 4 bits (NF4); goes with `adapter: qlora`."
    )
    quantize_moe_experts: Bool = Field(
        False, description="Hold the routed experts in 4 bits too; goes with `load_in_4bit`."
    )
    bf16: Bool | Literal["auto"] = Field(
        "auto",
        description="Precision of a frozen base and of the computation: `auto` is bfloat16 on a GPU and "
        "float32 on a CPU; "
        "`true` is bfloat16, `false` float32. What is trained (adapters, or every weight of a full "
        "fine-tune) is kept in float32, and computes in the same precision as the rest.",
    )
    tf32: Bool = Field(False, description="Let float32 matrix products use TF32 on a GPU.")
    gradient_checkpointing: Bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations block by block in the backward pass (non-reentrant): `auto` in "
        "those blocks whose activations do not fit into the GPU's memory, which is measured at the start "
        "(on a CPU in none), and of these as many keep theirs in the host's memory as can be copied while "
        "others compute (none where FSDP2 shards); `true` in all, `false` in none.",
    )


class AdapterSection(Section):
    """What is trained: a LoRA on named targets, or every weight."""

    adapter: Annotated[Literal["lora", "qlora"] | None, Kind("lora, qlora or none")] = Field(
        None, description="`lora`, `qlora`, or `none` for a full fine-tune (every weight is trained)."
    )
    lora_r: PositiveInt = Field(16, description="Rank of the LoRA factors.")
    lora_alpha: Positive = Field(
        default_factory=lambda values: 2.0 * values["lora_r"],
        description="The LoRA's output is scaled by lora_alpha / rank.",
        json_schema_extra={"default_text": "2 x lora_r"},
    )
    rank_pattern: RankPattern = Field(
        {},
        description="Other ranks than `lora_r` for some targets, such as `{experts.up_proj: 8}`: the end of "
        "a path, or a regular expression for one. The first that matches counts.",
    )
    alpha_pattern: AlphaPattern = Field(
        {}, description="Other values than `lora_alpha` for some targets, in the same way."
    )
    lora_dropout: Fraction = Field(
        0.0, description="Dropout before the LoRA of a linear layer; must be 0 with `lora_target_parameters`."
    )
    lora_target_modules: TextList = Field(
        (),
        description="Linear layers that get a LoRA, as in PEFT by name, path or regular expression: q_proj, "
        "k_proj, v_proj, o_proj, in_proj, out_proj, up_proj, down_proj (shared experts and dense MLPs).",
    )
    lora_target_linear: Bool = Field(
        False,
        description="A LoRA on q,k,v,o, in_proj, out_proj, shared experts, dense MLPs and latent "
        "projections; never on router, head or embeddings.",
    )
    lora_target_parameters: TextList = Field(
        (),
        description="3-D expert parameters that get a LoRA for each expert: up_proj, down_proj. Without "
        "other targets, experts only are trained.",
    )
    lora_modules_to_save: ModuleList = Field(
        (), description="Modules trained whole beside the LoRA, in float32: `lm_head`, `embeddings`."
    )
    lora_model_dir: PathText | None = Field(
        None,
        description="Adapter to start from, instead of new factors: a folder as PEFT saves it, of the same "
        "targets, ranks and scalings.",
    )
    peft_use_rslora: Bool = Field(
        False, description="The LoRA's output is scaled by lora_alpha / sqrt(rank) instead."
    )
    peft_init_lora_weights: Annotated[
        Literal[True, "gaussian", "orthogonal"], Kind("true, gaussian or orthogonal")
    ] = Field(
        True,
        description="How new factors start, as in PEFT: `true`, A uniform (Kaiming) and B zero; `gaussian`, "
        "A normal with deviation 1 / rank and B zero; `orthogonal`, both random, their product zero (even "
        "ranks only).",
    )


class DatasetSpec(Section):
    """One source of rows."""

    path: PathText = Field(
        description="A file, a pattern (`data/*.jsonl`), a folder of files, a URL of one of these (s3://, "
        "gs://, abfs://), a folder that `datasets` saved, or a dataset on the Hugging Face hub, "
        "`owner/name`: its data files are downloaded. Files are JSON lines, a JSON array, CSV, TSV, Parquet, "
        "Arrow or plain text, the textual ones also compressed (.gz, .zst, .bz2, .lz4)."
    )
    name: Text | None = Field(
        None, description="Configuration of a hub dataset, where its card has several (`configs`)."
    )
    revision: Text | None = Field(
        None,
        description="Branch, tag or commit of a hub dataset.",
        json_schema_extra={"default_text": "main"},
    )
    type: Literal[
        "chat_template", "prompt_completion", "alpaca", "input_output", "completion", "pretrain", "tokenized"
    ] = Field(
        "chat_template",
        description="What a row holds (docs/formats.md shows each). `chat_template`: a conversation, "
        "rendered by the chat template; the assistant's turns are trained. `prompt_completion`: a prompt "
        "and its completion, as text or as messages; the completion is trained. `alpaca`: instruction, "
        "input and output; the output is trained. `input_output`: segments of text, each trained or not. "
        "`completion`: plain text, all of it trained. `pretrain`: the same, and a text longer than "
        "`sequence_len` becomes several documents. `tokenized`: `input_ids` and `labels`.",
    )
    split: Text | None = Field(
        None,
        description="Rows to take, as a slice: `train[:20%]`, `train[100:200]`. Without one, all rows; of a "
        "dataset with named splits (on the hub, or saved by `datasets`) those of `train`, in `test_datasets` "
        "those of `test`.",
    )
    shards: PositiveInt | None = Field(
        None, description="Take one of so many parts of the rows, each of consecutive rows."
    )
    shards_idx: NonNegativeInt = Field(0, description="Which of the `shards` parts, from 0.")
    weight: Positive | None = Field(
        None,
        description="The dataset's part of the trained tokens, relative to the weights of the others. An "
        "epoch has as many tokens as all datasets together: what is too small for its part is read more than "
        "once, what is too large goes on in the next epoch. Give it to all datasets or to none.",
        json_schema_extra={"default_text": "each row once an epoch"},
    )
    data_files: PathList = Field(
        (), description="Files to take from the folder, URL or hub dataset `path`; patterns are allowed."
    )
    streaming: Bool = Field(
        False,
        description="Read a hub dataset's files where they lie, a window at a time, instead of downloading "
        "them. Of Parquet only what is needed is transferred; files of lines are read through once at the "
        "start, and again window by window. Files at URLs are always read so.",
    )
    ds_type: Literal["json", "csv", "tsv", "parquet", "arrow", "text"] | None = Field(
        None,
        description="File format; without it, from the suffix (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, "
        ".arrow, .txt).",
    )
    field_messages: Text = Field("messages", description="Field of a row that holds the conversation.")
    message_property_mappings: Mapping = Field(
        {"role": "role", "content": "content"},
        description="Name in the chat template: field of a message. Fields that are not named keep theirs.",
    )
    field: Text = Field("text", description="Field of a `completion` or `pretrain` row that holds the text.")
    roles: RolesMap = Field(
        {},
        description="Role in the chat template: names that it has in the rows, such as `{assistant: [bot]}`. "
        "Other roles keep theirs.",
        json_schema_extra={"default_text": "`{user: [human], assistant: [gpt]}`"},
    )
    roles_to_train: TextList = Field(
        ("assistant",),
        description="Roles whose turns are trained. `[]`: only what `message_field_training` says.",
        json_schema_extra={"default_text": "`[assistant]`"},
    )
    message_field_training: Text | None = Field(
        None,
        description="Field of a message that says, true or false, whether its turn is trained; it wins over "
        "`roles_to_train`.",
    )
    message_field_training_detail: Text | None = Field(
        None,
        description="Field of a message that lists parts of its content: "
        "`{begin_offset, end_offset, train}`, in characters, the last one included. Only parts with "
        "`train: true` are trained, and the token that ends the turn.",
    )
    train_on_eos: Literal["all", "turn", "last", "none"] | None = Field(
        None,
        description="Whether the eos token is trained where it ends a turn: of every turn, of every trained "
        "turn, of the last trained turn, or never.",
        json_schema_extra={"default_text": "as the template's marks say; without marks, `turn`"},
    )
    train_on_eot: Literal["all", "turn", "last", "none"] | None = Field(
        None,
        description="The same for the other tokens of `eot_tokens`.",
        json_schema_extra={"default_text": "as train_on_eos"},
    )
    eot_tokens: TextList = Field((), description="As at the top level, for this dataset.")
    drop_system_message: Bool = Field(
        False, description="Leave out a chat's first turn if it is a system turn."
    )
    field_system: Text | None = Field(
        None,
        description="Field of a row that holds a system message, put before a chat without one; for "
        "`alpaca`, the field that takes the place of `system_prompt`.",
        json_schema_extra={"default_text": "`system` for chats"},
    )
    field_tools: Text = Field(
        "tools",
        description="Field of a row that holds its tools: a list of objects, or the same as JSON text.",
    )
    chat_template: Annotated[PathText | None, Kind("tokenizer_default or a path")] = Field(
        None,
        description="Another chat template for this dataset.",
        json_schema_extra={"default_text": "as at the top level"},
    )
    chat_template_kwargs: Arguments = Field(
        {}, description="As at the top level, for this dataset; a name given here wins."
    )
    field_prompt: Text = Field("prompt", description="Field of a `prompt_completion` row: text or messages.")
    field_completion: Text = Field("completion", description="The field with what follows the prompt.")
    field_segments: Text = Field(
        "segments", description="Field of an `input_output` row: a list of `{label: true or false, text}`."
    )
    field_instruction: Text = Field("instruction", description="Field of an `alpaca` row with the task.")
    field_input: Text = Field(
        "input", description="The field with its input; absent or empty, there is none."
    )
    field_output: Text = Field("output", description="The field with the answer, which is trained.")
    system_prompt: Annotated[str | None, Kind("text, or empty text")] = Field(
        None,
        description="What an `alpaca` prompt begins with; empty text for nothing.",
        json_schema_extra={"default_text": "Alpaca's own sentence"},
    )
    system_format: Text = Field(
        "{system}\n\n",
        description="How an `alpaca` prompt writes it: `{system}` stands for the text.",
        json_schema_extra={"default_text": "`{system}` and a blank line"},
    )
    format: Text = Field(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        description="The rest of an `alpaca` prompt, with `{instruction}` and `{input}` in their places.",
        json_schema_extra={"default_text": "Alpaca's own"},
    )
    no_input_format: Text = Field(
        "### Instruction:\n{instruction}\n\n### Response:\n",
        description="The same where there is no input.",
        json_schema_extra={"default_text": "Alpaca's own"},
    )


class DataSection(Section):
    """Which rows, how they become tokens, and how tokens become packs."""

    datasets: Annotated[
        tuple[DatasetSpec, ...], Field(min_length=1), Kind("a list of datasets, each with a path")
    ] = Field(description="What is trained on; the keys of an entry are in the next table.")
    test_datasets: Annotated[tuple[DatasetSpec, ...], Kind("a list of datasets, each with a path")] = Field(
        (), description="What is evaluated on, in the same form; instead of `val_set_size`."
    )
    streaming: Bool = Field(False, description="The same as `streaming` of each entry.")
    val_set_size: HeldOut = Field(
        0,
        description="Held-out rows: a fraction below 1, or a number of rows. Chosen by row number, "
        "whatever the seed.",
    )
    dataset_prepared_path: PathText | None = Field(
        None,
        description="Where prepared shards are kept, to be reused by later runs: a path that all nodes see, "
        "or the URL of an object store (`s3://`, `gs://`, `abfs://`).",
        json_schema_extra={"default_text": "output_dir/prepared"},
    )
    sequence_len: PackLength = Field(
        2048,
        description="Tokens of a pack, exactly; the longest row that is kept whole. Two at least: a token is "
        "learned from those before it. At most 2147483647, and so with the `micro_batch_size` packs of a "
        "forward pass, whose tokens are numbered in 32 bits on a GPU.",
    )
    sample_packing: Bool = Field(
        True,
        description="Put several rows in a pack, each seeing only itself; `false` is one row a pack, "
        "padded right.",
    )
    eval_sample_packing: Bool | None = Field(
        None,
        description="The same for held-out rows.",
        json_schema_extra={"default_text": "as sample_packing"},
    )
    excess_length_strategy: Literal["drop", "truncate"] = Field(
        "drop",
        description="A row longer than `sequence_len` is left out, or cut at the end. Both are counted.",
    )
    max_rejected_share: Ratio = Field(
        0.05,
        description="The run stops when more than this part of all rows is rejected, which means that they "
        "cannot be used; `rejected.jsonl` lists them. Below 0.5 it stops early where more than half of the "
        "first rows are: 2,000 or more, of two windows or more. Rows that are too long are not rejected.",
    )
    train_on_inputs: Bool = Field(
        False, description="Make every token of a conversation a target, not only the answers."
    )
    chat_template: Annotated[PathText, Kind("tokenizer_default or a path")] = Field(
        "tokenizer_default",
        description="`tokenizer_default` (the one in the base model's folder), or a .jinja file.",
    )
    chat_template_kwargs: Arguments = Field(
        {},
        description="Values that the chat template sees by their names, such as `{enable_thinking: false}` "
        "or `{truncate_history_thinking: false}`.",
    )
    eot_tokens: TextList = Field(
        (),
        description="Tokens that end a turn, for `train_on_eos` and `train_on_eot`.",
        json_schema_extra={"default_text": "the eos token"},
    )
    special_tokens: Mapping = Field(
        {},
        description="Tokens of the tokenizer in other roles: `pad_token` fills packs, and is never a target "
        "(without it the tokenizer's pad, else its eos); `bos_token`, `eos_token` and `unk_token` are what "
        "the chat template sees.",
    )


class TrainSection(Section):
    """How long, how fast, and what is written on the way."""

    output_dir: PathText = Field(
        "outputs/out",
        description="Folder of the run: metrics, checkpoints and the result; a path that all nodes see, or "
        "the URL of a folder in an object store.",
    )
    overwrite: Bool = Field(
        False, description="Replace the run that `output_dir` holds, unless it is resumed."
    )
    micro_batch_size: PositiveInt = Field(1, description="Packs in one forward pass of a worker.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Forward passes of a worker in one optimizer step."
    )
    num_epochs: Epochs = Field(1.0, description="Passes over the rows, a million at most; `max_steps` wins.")
    max_steps: PositiveInt | None = Field(
        None, description="Optimizer steps of the run, whatever `num_epochs` says."
    )
    learning_rate: Positive = Field(2e-4, description="The highest rate, at the end of the warmup.")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine",
        description="How the rate falls to 0 after the warmup: by a half cosine, in a line, or not at all; "
        "`constant` has no warmup.",
    )
    warmup_steps: NonNegativeInt | None = Field(None, description="Steps in which the rate rises from 0.")
    warmup_ratio: Ratio = Field(
        0.0, description="Part of the run in which the rate rises from 0, instead of `warmup_steps`."
    )
    optimizer: Annotated[Literal["adamw_torch", "adamw_8bit"], Kind("the name of an AdamW")] = Field(
        "adamw_torch",
        description="`adamw_torch`: AdamW with float32 states. `adamw_8bit`: bitsandbytes' AdamW with states "
        "in 8 bits; its checkpoints resume on as many workers as wrote them. Other names of axolotl run as "
        "the nearer of these two.",
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW's decoupled weight decay.")
    adam_beta1: Fraction = Field(0.9, description="AdamW's decay of the mean of gradients.")
    adam_beta2: Fraction = Field(0.999, description="AdamW's decay of the mean of squared gradients.")
    adam_epsilon: Positive = Field(1e-8, description="AdamW's epsilon.")
    cuda_graphs: Bool = Field(
        True,
        description="Record the forward and backward passes of a step as CUDA graphs and replay them, on a "
        "GPU, where LoRA factors alone train and without `lora_dropout`; elsewhere, and where factors are "
        "sharded, they run as they are.",
    )
    max_grad_norm: Annotated[Positive | None, Kind("a finite number, 0 or more")] = Field(
        1.0, description="Gradients are scaled down to this norm, over all workers; 0 switches it off."
    )
    max_nonfinite_steps: PositiveInt = Field(
        3,
        description="A step whose loss or gradient is not finite changes no weight, and its batch is written "
        "to `output_dir/nonfinite`; so many of them in a row end the run.",
    )
    logging_steps: PositiveInt = Field(
        1, description="A row is written to metrics.jsonl every so many steps."
    )
    profiler_steps: PositiveInt | None = Field(
        None,
        description="Record so many steps on rank 0 with torch's profiler: a Chrome trace in "
        "`output_dir/profile.json.gz`, and on a GPU its time by kind of kernel in run.json.",
    )
    profiler_steps_start: NonNegativeInt = Field(
        5, description="Steps before the first one that is recorded; the first ones of a run are not typical."
    )
    evals_per_epoch: PositiveInt | None = Field(
        None,
        description="Evaluations in an epoch, beside those at step 0 and the end; with `max_steps`, an epoch "
        "is max_steps / num_epochs steps.",
    )
    eval_steps: PositiveInt | None = Field(
        None, description="Steps from one evaluation to the next, instead of `evals_per_epoch`."
    )
    saves_per_epoch: PositiveInt | None = Field(
        None, description="Checkpoints in an epoch, counted likewise, beside the last one."
    )
    save_steps: PositiveInt | None = Field(
        None, description="Steps from one checkpoint to the next, instead of `saves_per_epoch`."
    )
    save_total_limit: PositiveInt | None = Field(
        None,
        description="Checkpoints that are kept; without it, all. With `load_best_model_at_end` the best one "
        "is always among them, beside the newest.",
    )
    load_best_model_at_end: Bool = Field(
        False,
        description="Write as the result the weights of the evaluation with the lowest "
        "`metric_for_best_model`, instead of the last ones. A checkpoint is also written at every evaluation "
        "that is the best so far.",
    )
    metric_for_best_model: Metric = Field(
        "eval_loss",
        description="What the best evaluation is chosen by, and early stopping goes by: the loss over all "
        "held-out rows, or that of one dataset, by the name that it has in metrics.jsonl. The evaluation at "
        "step 0 does not count.",
    )
    greater_is_better: Bool = Field(False, description="Must be `false`, since every metric here is a loss.")
    early_stopping_patience: PositiveInt | None = Field(
        None,
        description="The run ends after so many evaluations in a row that were not better than the best one "
        "before.",
    )
    early_stopping_threshold: NonNegative = Field(
        0.0, description="By how much an evaluation must be better to count for `early_stopping_patience`."
    )
    seed: Seed = Field(42, description="Seed of the order of packs, of new weights and of dropout.")
    resume_from_checkpoint: Annotated[PathText | None, Kind("auto or a path")] = Field(
        None,
        description="`auto`: the newest complete checkpoint in `output_dir`, or a fresh start where there "
        "is none; or the path of a checkpoint, or its URL in an `output_dir` that is one.",
    )
    dp_shard_size: PositiveInt | None = Field(
        None,
        description="Workers that share one copy of the weights; 1: each holds all of them. Without this key "
        "and the next, on GPUs the fewest that have the memory, on CPUs all. What an adapter trains is whole "
        "on each, unless the memory is too small for that.",
    )
    dp_replicate_size: PositiveInt | None = Field(
        None, description="Groups of dp_shard_size workers; each group holds a copy of the weights."
    )
    completion_prompts: TextList = Field(
        (), description="Prompts completed before and after training, into completions.jsonl."
    )
    completion_max_new_tokens: PositiveInt = Field(48, description="Tokens of such a completion, at most.")


class TrackingSection(Section):
    """Which trackers get the figures, beside TensorBoard."""

    use_wandb: Bool | None = Field(
        None,
        description="Send the figures to Weights & Biases (`pip install nemo-ray[wandb]`); see "
        "[tracking.md](tracking.md).",
        json_schema_extra={"default_text": "where `wandb_project` is given"},
    )
    wandb_project: Text | None = Field(None, description="Project in W&B.")
    wandb_entity: Text | None = Field(None, description="User or team that the project belongs to.")
    wandb_name: Text | None = Field(
        None, description="Name of the run.", json_schema_extra={"default_text": "that of `output_dir`"}
    )
    wandb_group: Text | None = Field(
        None,
        description="Group that the run is listed in.",
        json_schema_extra={"default_text": "none; of a sweep's trials the name of its `output_dir`"},
    )
    wandb_run_id: Text | None = Field(
        None,
        description="Id of the run. A continued run has the id that it began with.",
        json_schema_extra={"default_text": "a new one"},
    )
    wandb_mode: Literal["online", "offline", "disabled"] | None = Field(
        None,
        description="`offline` writes to `output_dir/wandb`, for `wandb sync`; `disabled` sends nothing.",
        json_schema_extra={"default_text": "WANDB_MODE, else online"},
    )
    use_mlflow: Bool | None = Field(
        None,
        description="Send the figures to MLflow (`pip install nemo-ray[mlflow]`); see "
        "[tracking.md](tracking.md).",
        json_schema_extra={"default_text": "where `mlflow_experiment_name` is given"},
    )
    mlflow_tracking_uri: Text | None = Field(
        None, description="The server.", json_schema_extra={"default_text": "MLFLOW_TRACKING_URI"}
    )
    mlflow_experiment_name: Text | None = Field(
        None,
        description="Experiment that the run belongs to.",
        json_schema_extra={"default_text": "`Default`"},
    )
    mlflow_run_name: Text | None = Field(
        None, description="Name of the run.", json_schema_extra={"default_text": "that of `output_dir`"}
    )
    mlflow_parent_run_id: Text | None = Field(
        None,
        description="Run under which this one is listed.",
        json_schema_extra={"default_text": "none; of a sweep's trials a run of the sweep's"},
    )

    @property
    def sends_to_wandb(self) -> bool:
        wanted = self.wandb_project is not None if self.use_wandb is None else self.use_wandb
        return wanted and self.wandb_mode != "disabled"

    @property
    def sends_to_mlflow(self) -> bool:
        return self.mlflow_experiment_name is not None if self.use_mlflow is None else self.use_mlflow


class RaySection(Section):
    """Where it runs."""

    address: Text | None = Field(
        None,
        description="Cluster to connect to; without it (and without RAY_ADDRESS) a local Ray is started.",
    )
    num_workers: Workers | None = Field(
        None,
        description="Training workers. Required on a cluster. `[the fewest, the most]`: it starts, and goes "
        "on after a loss, with as many as there is room for. A step is that of the most, whatever their "
        "number: it changes no result.",
        json_schema_extra={"default_text": "this machine's GPUs, else 1"},
    )
    use_gpu: Bool | None = Field(
        None, description="Give each worker a GPU.", json_schema_extra={"default_text": "where GPUs are seen"}
    )
    resources_per_worker: Resources = Field(
        {}, description="Ray resources of a worker, such as `{CPU: 4, GPU: 1}`."
    )
    accelerator_type: Text | None = Field(
        None, description="Kind of GPU to ask for, in Ray's names, such as `H100`."
    )
    wait_for_nodes_s: NonNegative = Field(
        0.0,
        description="How long a cluster may take to have room for the workers, for an autoscaler that starts "
        "nodes. They are asked for at once, and no more than the workers need. Where GPUs come only then, "
        "`use_gpu: true` says so.",
    )
    max_failures: FailureCount = Field(
        3,
        description="Restarts from the last checkpoint after lost workers. Each new checkpoint sets the "
        "count back to 0: failures without progress end a run, not its length.",
    )
    hang_timeout_s: NonNegative = Field(
        600.0,
        description="A worker that takes longer for a step, or for a batch of an evaluation, is ended, its "
        "stack is put into error.log, and the workers start again. Waiting for data may take 1800 s more; "
        "loading, saving and exporting 12 times as long. 0 for no limit.",
    )
    storage_path: PathText | None = Field(
        None,
        description="Where relative output paths lie under `ray job submit`.",
        json_schema_extra={"default_text": "~/nemo_ray"},
    )


class Config(TrackingSection, TrainSection, DataSection, AdapterSection, ModelSection):
    """A whole run, flat like the YAML; parts of the code are handed only their section."""

    ray: Annotated[RaySection, Kind("a section of keys")] = Field(
        RaySection(), description="Where it runs; its keys are in a table of their own."
    )

    def section(self, kind: type[SectionT]) -> SectionT:
        """The part of this configuration that `kind` describes."""
        return cast(
            SectionT, kind.model_construct(**{name: getattr(self, name) for name in kind.model_fields})
        )

    @property
    def model(self) -> ModelSection:
        return self.section(ModelSection)

    @property
    def adapter_config(self) -> AdapterSection:
        return self.section(AdapterSection)

    @property
    def data(self) -> DataSection:
        return self.section(DataSection)

    @property
    def train(self) -> TrainSection:
        return self.section(TrainSection)

    @property
    def tracking(self) -> TrackingSection:
        return self.section(TrackingSection)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `Config.model_validate` reads it back to an equal configuration."""
        return self.model_dump(mode="json")

"""axolotl's top-level keys that are not keys here, by subject. What an entry means is axolotl.py's."""

from nemo_ray.config.axolotl import Foreign, notice, refuse

FOREIGN: tuple[Foreign, ...] = (
    # The architecture and its kernels.
    notice("liger_rope", "nothing to replace: the attention of Nemotron-H has no rotary embedding"),
    notice(
        "liger_rms_norm liger_rms_norm_gated liger_layer_norm",
        "the model's own norms run, with the same result",
    ),
    notice("liger_glu_activation liger_swiglu", "nothing to replace: the MLPs are relu2, without a gate"),
    notice(
        "use_cut_cross_entropy cut_cross_entropy liger_fused_linear_cross_entropy liger_cross_entropy "
        "chunked_cross_entropy chunked_cross_entropy_num_chunks flash_attn_cross_entropy",
        "the loss is always computed in chunks, without a matrix of all logits",
    ),
    refuse("liger_use_token_scaling", "it changes the loss, and is not supported yet; remove the key"),
    refuse(
        "lora_mlp_kernel",
        "there is no such kernel for Nemotron-H, whose MLP is relu2 and whose experts are 3-D parameters; "
        "set it to false (the LoRA of experts runs as grouped matrix products anyway)",
    ),
    notice(
        "lora_qkv_kernel lora_o_kernel",
        "the LoRA linear of this package runs instead: the attention of Nemotron-H lives in its block's "
        "mixer, where axolotl's kernels do not look",
    ),
    notice("lora_embedding_kernel", "nothing to replace: embeddings get no LoRA"),
    notice(
        "attn_implementation flash_attention sdp_attention eager_attention flex_attention "
        "xformers_attention sage_attention sdpa_varlen flash_optimum flash_attn_d512 "
        "flex_attn_compile_kwargs pretrain_multipack_attn large_head_attention fused_attn_kernel "
        "flash_attn_fuse_mlp flash_attn_fuse_qkv flash_attn_rms_norm",
        "the packed attention of this package runs, in which no row sees another",
    ),
    notice(
        "experts_implementation use_scattermoe use_sonicmoe expert_backend moe_grouped_backend use_kernels "
        "moe_dequant_chunk_size moe_bnb_fast",
        "the experts run as grouped matrix products of this package",
    ),
    refuse("s2_attention", "shifted attention changes the model, and is not supported; remove the key"),
    refuse(
        "rope_scaling rope_theta",
        "Nemotron-H has no rotary embedding to scale; remove the key (any length runs as is)",
    ),
    refuse(
        "scaling_softmax scaling_softmax_factor scaling_softmax_bias noisy_embedding_alpha "
        "neftune_noise_alpha use_pose pose_max_context_len pose_num_chunks pose_split_on_token_ids "
        "shrink_embeddings overrides_of_model_config overrides_of_model_kwargs model_config use_onebitllms",
        "it changes the model or its inputs, and is not supported; remove the key",
    ),
    notice(
        "gemma4_hybrid_attn_impl llama4_linearized_experts model_type type_of_model tokenizer_type "
        "processor_type is_falcon_derived_model is_llama_derived_model is_mistral_derived_model "
        "is_qwen_derived_model",
        "the classes follow from config.json and tokenizer.json in the base model's folder",
    ),
    notice("trust_remote_code", "never needed: no code of the base model's folder is run"),
    notice("strict", "always strict: an unknown key, and a weight that is missing or left over, is an error"),
    notice(
        "tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common tokenizer_save_jinja_files",
        "the tokenizer is read from tokenizer.json, which has one form only",
        (True,),
    ),
    refuse(
        "base_model_config tokenizer_config cls_model_config processor_kwargs",
        "model, config and tokenizer are read from one folder; put the files into the folder of base_model",
    ),
    refuse(
        "hub_revision revision",
        "the revision of the base model is named by revision_of_model; remove the key",
    ),
    # Precision and memory.
    refuse(
        "load_in_8bit gptq bnb_config_kwargs model_quantization_config model_quantization_config_kwargs "
        "gptq_groupsize gptq_model_v1 gptq_disable_exllama",
        "this way of quantizing is not supported; remove the key",
    ),
    refuse("fp16 float16", "float16 overflows in this model and is not supported; use bf16: auto"),
    notice(
        "float32 fp32_norms fp32_norm_classes embeddings_skip_upcast",
        "what is trained is kept in float32 anyway",
    ),
    refuse(
        "fp8 fp8_enable_fsdp_float8_all_gather nvfp4_training nvfp4_merge_aware "
        "nvfp4_merge_aware_start_step qat quantization torchao",
        "training in or for 8 or 4 bits floating point is not supported; remove the key",
    ),
    notice(
        "gradient_checkpointing_kwargs",
        "recomputation is always non-reentrant, block by block",
        (False, {"use_reentrant": False}),
    ),
    notice(
        "layer_offloading selective_checkpointing recompute_layer_types tiled_mlp "
        "tiled_mlp_num_shards tiled_mlp_use_original_mlp gpu_memory_limit max_memory lora_on_cpu "
        "experimental_skip_move_to_device gc_steps gc_collect_steps torch_empty_cache_steps",
        "not used: memory is saved by sharding over workers (dp_shard_size) and gradient_checkpointing",
    ),
    notice(
        "activation_offloading",
        "not used: gradient_checkpointing: auto moves to the host what does not fit on the GPU",
    ),
    notice(
        "low_cpu_mem_usage qlora_sharded_model_loading mean_resizing_embeddings device_map device",
        "each worker reads only its own part of the weights, onto its own device",
        (False, True, "auto"),
    ),
    notice(
        "torch_compile torch_compile_backend torch_compile_mode torch_compile_options "
        "torch_compile_dynamic deepcompile torch_dtype",
        "the step runs without torch.compile, in the precision that bf16 says",
        (False, "auto"),
    ),
    # Parallelism and start-up.
    notice("deepspeed", "not used: dp_shard_size and dp_replicate_size lay the model over workers"),
    notice(
        "fsdp fsdp_config fsdp_version fsdp_final_state_dict_type accelerator_config",
        "dp_shard_size (1: whole copies) and dp_replicate_size lay the model over workers, block by block",
    ),
    refuse(
        "context_parallel_size tensor_parallel_size expert_parallel_size pipeline_parallel_size",
        "more than 1 is not supported yet; remove the key, and use dp_shard_size to spread weights over "
        "workers",
        (1,),
    ),
    notice(
        "heads_k_stride ring_attn_func expert_parallel_backend expert_parallel_token_capacity "
        "expert_parallel_fallback_on_unsupported expert_parallel_num_nvl_bytes "
        "expert_parallel_num_rdma_bytes",
        "nothing to tune: a sequence and an expert stay on one worker",
    ),
    notice(
        "ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters local_rank "
        "world_size",
        "Ray Train starts the workers and sets their ranks and time limits",
    ),
    notice("use_ray", "Ray always runs the training", (True,)),
    notice("ray_run_name", "the run is known by its output_dir"),
    refuse("auto_find_batch_size batch_size", "set micro_batch_size and gradient_accumulation_steps"),
    notice(
        "eval_batch_size", "evaluation takes micro_batch_size packs at a time; the loss does not depend on it"
    ),
    # Data.
    notice("pad_to_sequence_len", "every pack has exactly sequence_len tokens", (True,)),
    notice(
        "pad_to_multiple_of sample_packing_group_size sample_packing_bin_size sample_packing_eff_est "
        "sample_packing_sequentially sample_packing_mp_start_method sample_packing_seq_len_multiplier "
        "multipack_real_batches batch_flattening group_by_length curriculum_sampling",
        "rows are packed best-fit within windows of consecutive rows, and packs are shuffled by seed",
    ),
    notice(
        "dataset_processes dataset_num_proc dataset_keep_in_memory dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last preprocess_iterable "
        "streaming_multipack_buffer_size pretrain_multipack_buffer_size "
        "num_dataset_shards_to_save shuffle_before_merging_datasets is_preprocess dispatch_batches "
        "split_batches accelerator_dataloader",
        "Ray Data prepares rows on the cluster while training runs, and every row is read once an epoch",
    ),
    notice("remove_unused_columns", "only the fields that the dataset's entry names are read", (False, True)),
    refuse("shuffle_merged_datasets", "packs are always shuffled by seed; remove the key", (True,)),
    refuse(
        "skip_prepare_dataset dataset_exact_deduplication dataset_shard_num dataset_shard_idx min_sample_len "
        "eval_sequence_len pretraining_sample_concatenation default_system_message field_messages "
        "message_property_mappings",
        "not supported at the top level; choose and shape the rows in datasets (plain text: type: "
        "completion)",
    ),
    refuse(
        "train_on_eos train_on_eot roles_to_train",
        "what is trained is said for each dataset; give the key in its entry of datasets",
    ),
    refuse(
        "tokens additional_special_tokens added_tokens_overrides resize_token_embeddings_to_32x "
        "fix_untrained_tokens peft_trainable_token_indices peft_ensure_weight_tying embedding_lr "
        "embedding_lr_scale",
        "new or trained tokens are not supported yet; use the tokenizer of the base model as it is",
    ),
    notice(
        "push_dataset_to_hub hf_use_auth_token dataset_push_to_hub",
        "nothing is uploaded; HF_TOKEN opens gated models",
    ),
    # Adapters.
    refuse(
        "peft_use_dora lora_fan_in_fan_out peft_layers_to_transform "
        "peft_layers_pattern peft_layer_replication loraplus_lr_ratio loraplus_lr_embedding relora "
        "relora_steps relora_prune_ratio relora_prune_method relora_cpu_offload relora_warmup_steps "
        "lisa_n_layers lisa_step_interval lisa_layers_attribute unfrozen_parameters spectrum_top_fraction "
        "spectrum_model_name use_mora mora freeze_mm_modules",
        "this way of choosing or scaling what is trained is not supported; remove the key",
    ),
    refuse(
        "peft loftq_config",
        "LoftQ takes the first product of the factors off the base, so that the adapter fits no other base "
        "than that one; remove the key (peft_init_lora_weights says how factors start)",
    ),
    notice(
        "peft_autocast_adapter_dtype",
        "adapters are trained and written in float32",
        (True,),
    ),
    # The optimizer.
    refuse(
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_scheduler_kwargs lr_quadratic_warmup "
        "lr_div_factor eta_min jagged_restart_steps jagged_restart_warmup_steps "
        "jagged_restart_anneal_steps lr_groups",
        "the rate falls from learning_rate to 0 as lr_scheduler says, other shapes are not supported; "
        "remove the key",
    ),
    refuse(
        "optim_args optim_target_modules adam_beta3 adam_epsilon2 dion_lr dion_momentum dion_rank_fraction "
        "dion_rank_multiple_of qgalore_rank qgalore_scale qgalore_update_proj_gap qgalore_proj_type "
        "qgalore_proj_quant qgalore_proj_bits grokfast_alpha grokfast_lamb dense_mixer",
        "only AdamW runs, with adam_beta1, adam_beta2 and adam_epsilon; remove the key",
    ),
    notice("torchdistx_path", "not needed: AdamW of torch runs"),
    # Other ways of training.
    refuse(
        "rl trl rl_beta dpo_beta dpo_loss_type dpo_label_smoothing dpo_use_weighting dpo_padding_free "
        "precompute_ref_log_probs max_prompt_len orpo_alpha simpo_gamma cpo_alpha rpo_alpha "
        "kto_desirable_weight kto_undesirable_weight reward_model process_reward_model "
        "center_rewards_coefficient num_labels vllm ebft diffusion kd_trainer kd_alpha kd_ce_alpha "
        "kd_temperature use_eaft eaft_alpha eaft_k nemo_gym_enabled hatchery llmcompressor do_bench_eval "
        "bench_dataset trainer_cls",
        "only supervised training on the next token is in this version; remove the key",
    ),
    refuse(
        "loss_watchdog_threshold loss_watchdog_patience",
        "stopping by the training loss is not supported; remove the key (early_stopping_patience stops by "
        "the held-out loss)",
    ),
    refuse("tune", "this is a sweep; start it with python -m nemo_ray.tune, or remove the section"),
    # Reports and files.
    notice(
        "wandb_watch wandb_log_model hf_mlflow_log_artifacts",
        "trackers get figures and the configuration, no gradients, weights or files",
        (False, "false"),
    ),
    notice("use_tensorboard", "event files are always written, to output_dir/tensorboard", (True,)),
    notice(
        "use_comet comet_api_key comet_experiment_config "
        "comet_experiment_key comet_mode comet_online comet_project_name comet_workspace use_swanlab "
        "swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace "
        "swanlab_api_key swanlab_log_model use_trackio trackio_project_name trackio_run_name "
        "trackio_space_id use_otel_metrics otel_metrics_host otel_metrics_port",
        "the trackers are TensorBoard, W&B and MLflow; metrics.jsonl in output_dir has the figures",
    ),
    notice("include_tokens_per_second include_tkps", "tokens per second are in metrics.jsonl", (False, True)),
    notice(
        "debug total_num_tokens total_supervised_tokens",
        "step times and token counts are in metrics.jsonl",
    ),
    notice(
        "hub_model_id hub_strategy", "nothing is uploaded; the result is in output_dir (adapter/, or model/)"
    ),
    notice("save_safetensors", "results are always written as safetensors", (True,)),
    notice(
        "save_only_model",
        "a checkpoint always holds the optimizer and the place in the data, so that it resumes",
    ),
    notice(
        "save_first_step save_sliding_window dynamic_checkpoint",
        "checkpoints are taken by save_steps or saves_per_epoch",
    ),
    notice(
        "do_causal_lm_eval eval_causal_lm_metrics eval_table_size eval_max_new_tokens generate_samples "
        "num_generation_samples generation_max_new_tokens generation_temperature generation_do_sample "
        "generation_top_k generation_top_p generation_prompt_ratio lm_eval_tasks lm_eval_batch_size "
        "lm_eval_post_train lm_eval_model",
        "evaluation is the held-out loss; completion_prompts are completed before and after training",
    ),
    notice(
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens "
        "gradio_temperature axolotl_config_path strategy cloud",
        "not used by training",
    ),
)

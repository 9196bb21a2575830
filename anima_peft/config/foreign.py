"""Options of sd-scripts and of its Anima fork that this version does not have, each with what to do instead.

The names are those of sd-scripts' anima_train_network.py (February 2026, and what later versions added) and of the
fork's, and the arguments of their network modules.
"""

from __future__ import annotations

from .schema import Foreign

_REMOVE = "remove it"
_ONE_RATE = "use network_args network_reg_lrs with patterns of module names"
_FROZEN = "remove it; the text encoder is never trained"
_COMPUTE = "remove it; mixed_precision sets the type, and adapter weights are kept in fp32"
_ATTENTION = "remove it and set attn_mode"
_DATASET = "describe the pictures in the dataset TOML (image_dir, num_repeats)"
_CACHES = "remove it; caches follow the content of pictures and captions"
_NOISE = "use noise_offset or ip_noise_gamma"
_LOSS = "remove it; loss_type and weighting_scheme shape the loss"
_OTHER_MODELS = "remove it; it is for other models"
_COMPILE = "remove it; torch_compile compiles each block, for any size from the second bucket on"
_DEEPSPEED = "remove it; accelerate's own launcher sets up several processes, without DeepSpeed"
_HUB = "remove it and upload the file with `hf upload`"
_MEMORY = "use gradient_checkpointing, blocks_to_swap or memory"
_QUANTIZED = "use base_quantization"
_METADATA = "remove it, or say it in metadata_description"
_ALWAYS_STOPS = "remove it; a loss that is not finite always ends the run"

# kinds of adapters by the names that other trainers give them
OTHER_NETWORKS = {
    "networks.lora": 'is for other models; use "networks.lora_anima"',
    "networks.lokr": 'is named "networks.lokr_anima" here, and its factor is 8 unless lokr_factor says otherwise',
    "networks.loha": 'is not supported in this version; use "networks.lora_anima" or "networks.lokr_anima"',
    "lycoris.kohya": 'is not needed; use "networks.lokr_anima", or "networks.lora_anima" for LoCon',
}

# names separated by spaces, and the advice they share
_TRAIN_GROUPS = (
    ("llm_adapter_path", "remove it; the text conditioner is read from anima_transformer"),
    ("self_attn_lr cross_attn_lr mlp_lr mod_lr", _ONE_RATE),
    ("text_encoder_lr network_train_text_encoder_only", _FROZEN),
    ("network_train_unet_only", _FROZEN),
    ("min_snr_gamma debiased_estimation_loss v_pred_like_loss", _LOSS),
    ("scale_v_pred_loss_like_noise_pred", _LOSS),
    ("adaptive_noise_scale multires_noise_iterations multires_noise_discount", _NOISE),
    ("sample_sampler", "remove it; pictures are drawn with the model's own sampler, Euler"),
    ("save_n_epoch_ratio", "use save_every_n_epochs"),
    ("save_model_as use_safetensors", "remove it; files are always safetensors, and save_format names the layout"),
    ("huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token", _HUB),
    ("huggingface_repo_visibility save_state_to_huggingface async_upload", _HUB),
    ("resume_from_huggingface", "remove it; download the state folder and name it in resume"),
    ("log_config", "remove it; the configuration is always written beside the adapter and into its metadata"),
    ("console_log_level console_log_file console_log_simple", "remove it; warnings go to standard error"),
    ("output_config", "remove it; --print_config prints the configuration as TOML"),
    ("metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_reso", _METADATA),
    ("metadata_preprocessor metadata_is_negative_embedding", _METADATA),
    ("use_8bit_adam use_lion_optimizer", "remove it and set optimizer_type"),
    ("lr_warmup_ratio", "use lr_warmup_steps with a number below 1"),
    ("fused_backward_pass blockwise_fused_optimizers fused_optimizer_groups", _REMOVE),
    ("full_fp16 full_bf16 no_half_vae", _COMPUTE),
    ("fp8_base fp8_base_unet fp8_scaled", _QUANTIZED),
    ("cpu_offload_checkpointing unsloth_offload_checkpointing", _MEMORY),
    ("split_attn sdpa mem_eff_attn", _ATTENTION),
    ("compile_mode compile_dynamic compile_fullgraph compile_cache_size_limit", _COMPILE),
    ("cuda_allow_tf32 cuda_cudnn_benchmark", "remove it; PyTorch's defaults are used"),
    ("text_encoder_batch_size", "remove it; captions are encoded in small batches, once"),
    (
        "vae_chunk_size vae_disable_cache qwen_image_vae_2d",
        "remove it; vae_batch_size sets how much is encoded at once, and vae_tiling cuts large pictures",
    ),
    ("lowram highvram disable_mmap_load_safetensors", _REMOVE),
    ("ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph", _REMOVE),
    ("deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device", _DEEPSPEED),
    ("offload_param_nvme_path zero3_init_flag zero3_save_16bit_model", _DEEPSPEED),
    ("fp16_master_weights_and_gradients", _DEEPSPEED),
    ("skip_cache_check cache_info", _CACHES),
    ("train_data_dir reg_data_dir in_json dataset_class debug_dataset", _DATASET),
    ("initial_epoch initial_step skip_until_initial_step", "use resume"),
    ("t5_tokenizer_validate_strict", "remove it; a tokenizer is always validated"),
    ("anima_monitor_memory anima_monitor_memory_warn_ratio", "remove it; peak memory is always logged"),
    ("anima_monitor_alert_policy anima_monitor_loss_spike_ratio", _ALWAYS_STOPS),
    ("anima_resume_snapshot_strict", "remove it; what a state was made with is always checked"),
    ("tokenizer_cache_dir max_token_length weighted_captions", "remove it; anima_seq_len sets the length of captions"),
    ("v2 v_parameterization clip_skip zero_terminal_snr", _OTHER_MODELS),
)

_CAPTION_GROUPS = (
    ("face_crop_aug_range", "use random_crop"),
    ("network_multiplier", _REMOVE),
    ("cache_info", _CACHES),
)

_NETWORK_GROUPS = (
    ("verbose", _REMOVE),
    ("train_block_indices", "list the layers in target_modules"),
    ("conv_dim conv_alpha", "remove it and set network_dim"),
    ("loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio", "use loraplus_lr_ratio"),
    ("algo preset use_tucker use_scalar", _REMOVE),
)

# values that ask for nothing though they are not false, 0 or empty: other trainers' defaults
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "network_train_unet_only": (True,),
    "multires_noise_discount": (0.3,),
    "sample_sampler": ("ddim", "euler"),
    "save_model_as": ("safetensors",),
    "use_safetensors": (True,),
    "anima_monitor_memory": (True,),
    "anima_monitor_memory_warn_ratio": (0.95,),
    "anima_monitor_alert_policy": ("warn",),
    "anima_monitor_loss_spike_ratio": (3.0,),
    "sdpa": (True,),
    "compile_mode": ("default",),
    "compile_dynamic": ("auto", "false"),
    "zero_stage": (2,),
    "auto_download_t5_tokenizer": (True,),
    "initial_epoch": (1,),
    "network_multiplier": (1.0,),
}


def _table(*groups: tuple[str, str]) -> dict[str, Foreign]:
    return {name: Foreign(advice, _NEUTRAL.get(name, ())) for names, advice in groups for name in names.split()}


CAPTION_AND_PICTURE_OPTIONS = _table(*_CAPTION_GROUPS)
TRAIN_OPTIONS = {**CAPTION_AND_PICTURE_OPTIONS, **_table(*_TRAIN_GROUPS)}
ARGUMENTS = {"network_args": _table(*_NETWORK_GROUPS)}

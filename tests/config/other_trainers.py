"""What other trainers' users bring: every option name of sd-scripts' Anima trainer and of its fork, and typical files.

The names were read from the argument parsers of sd-scripts (anima_train_network.py, train_network.py and
library/{train_util,anima_train_utils,config_util,custom_train_functions,deepspeed_utils,sai_model_spec,utils}.py, up to
version 0.10 and what later versions added) and of the fork's anima_train_network.py.
"""

from __future__ import annotations

SD_SCRIPTS_OPTIONS = """
console_log_level console_log_file console_log_simple
v2 v_parameterization pretrained_model_name_or_path tokenizer_cache_dir
metadata_title metadata_author metadata_description metadata_license metadata_tags metadata_usage_hint
metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding
train_data_dir cache_info shuffle_caption caption_separator caption_extension caption_extention keep_tokens
keep_tokens_separator secondary_separator enable_wildcard caption_prefix caption_suffix color_aug flip_aug
face_crop_aug_range random_crop debug_dataset resolution cache_latents vae_batch_size cache_latents_to_disk
skip_cache_check enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale
resize_interpolation token_warmup_min token_warmup_step alpha_mask dataset_class caption_dropout_rate
caption_dropout_every_n_epochs caption_tag_dropout_rate reg_data_dir in_json dataset_repeats
output_dir output_name huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload save_precision
save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state save_last_n_steps
save_last_n_steps_state save_state save_state_on_train_end resume train_batch_size max_token_length mem_eff_attn
torch_compile dynamo_backend xformers sdpa vae max_train_steps max_train_epochs max_data_loader_n_workers
persistent_data_loader_workers seed gradient_checkpointing gradient_accumulation_steps mixed_precision full_fp16
full_bf16 fp8_base ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph clip_skip logging_dir log_with log_prefix
log_tracker_name wandb_run_name log_tracker_config wandb_api_key log_config noise_offset noise_offset_random_strength
multires_noise_iterations ip_noise_gamma ip_noise_gamma_random_strength multires_noise_discount adaptive_noise_scale
zero_terminal_snr min_timestep max_timestep loss_type huber_schedule huber_c huber_scale lowram highvram
sample_every_n_steps sample_at_first sample_every_n_epochs sample_prompts sample_sampler config_file output_config
prior_loss_weight conditioning_data_dir masked_loss
deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device
offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients
optimizer_type use_8bit_adam use_lion_optimizer learning_rate max_grad_norm optimizer_args lr_scheduler_type
lr_scheduler_args lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power
fused_backward_pass lr_scheduler_timescale lr_scheduler_min_lr_ratio dataset_config
min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss weighted_captions
cpu_offload_checkpointing no_metadata save_model_as unet_lr text_encoder_lr fp8_base_unet network_weights
network_module network_dim network_alpha network_dropout network_args network_train_unet_only
network_train_text_encoder_only training_comment dim_from_weights scale_weight_norms base_weights
base_weights_multiplier no_half_vae skip_until_initial_step initial_epoch initial_step validation_seed
validation_split validate_every_n_steps validate_every_n_epochs max_validation_steps
cache_text_encoder_outputs cache_text_encoder_outputs_to_disk text_encoder_batch_size disable_mmap_load_safetensors
weighting_scheme logit_mean logit_std mode_scale blocks_to_swap
qwen3 llm_adapter_path llm_adapter_lr self_attn_lr cross_attn_lr mlp_lr mod_lr t5_tokenizer_path
qwen3_max_token_length t5_max_token_length discrete_flow_shift timestep_sampling sigmoid_scale attn_mode split_attn
vae_chunk_size vae_disable_cache unsloth_offload_checkpointing fp8_scaled
compile compile_backend compile_mode compile_dynamic compile_fullgraph compile_cache_size_limit cuda_allow_tf32
cuda_cudnn_benchmark qwen_image_vae_2d
"""

FORK_OPTIONS = """
anima_transformer qwen t5_tokenizer_dir auto_download_t5_tokenizer t5_tokenizer_repo_id t5_tokenizer_subfolder
t5_tokenizer_modelscope_fallback t5_tokenizer_modelscope_repo_id t5_tokenizer_modelscope_revision
t5_tokenizer_modelscope_subfolder t5_tokenizer_validate_strict anima_attention_backend xfomers anima_seq_len
anima_timestep_sampling anima_sigmoid_scale anima_flow_shift anima_noise_offset train_norm anima_monitor_memory
anima_monitor_alert_policy anima_monitor_memory_warn_ratio anima_monitor_loss_spike_ratio anima_resume_snapshot_strict
"""

NETWORK_ARGUMENTS = """
train_llm_adapter exclude_patterns include_patterns rank_dropout module_dropout verbose network_reg_lrs
network_reg_dims loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio
target_modules train_norm lokr_factor lokr_full_matrix lokr_decompose_both lokr_rank_dropout lokr_module_dropout
factor conv_dim conv_alpha algo preset use_tucker
"""

DATASET_KEYS = """
resolution batch_size enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale
resize_interpolation validation_split validation_seed network_multiplier
num_repeats shuffle_caption caption_separator keep_tokens keep_tokens_separator secondary_separator enable_wildcard
color_aug flip_aug face_crop_aug_range random_crop caption_prefix caption_suffix caption_dropout_rate
caption_dropout_every_n_epochs caption_tag_dropout_rate token_warmup_min token_warmup_step caption_extension
class_tokens cache_info is_reg alpha_mask metadata_file conditioning_data_dir
"""

SD_SCRIPTS_FILE = """
[model]
pretrained_model_name_or_path = "models/anima-base.safetensors"
qwen3 = "models/qwen3"
vae = "models/qwen_image_vae.safetensors"
t5_tokenizer_path = "models/t5"

[network]
network_module = "networks.lora_anima"
network_dim = 16
network_alpha = 8
network_train_unet_only = true
network_args = ["train_llm_adapter=False"]

[training]
max_train_epochs = 10
learning_rate = 1e-4
lr_scheduler = "cosine"
lr_warmup_steps = 0.05
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.01", "betas=0.9,0.99"]
timestep_sampling = "shift"
discrete_flow_shift = 3.0
weighting_scheme = "none"
mixed_precision = "bf16"
gradient_checkpointing = true
attn_mode = "torch"
cache_latents = true
cache_latents_to_disk = true
cache_text_encoder_outputs = true
cache_text_encoder_outputs_to_disk = true
vae_batch_size = 2
max_data_loader_n_workers = 2
persistent_data_loader_workers = true
max_grad_norm = 1.0
seed = 42

[saving]
output_dir = "output"
output_name = "anima_lora"
save_model_as = "safetensors"
save_precision = "bf16"
save_every_n_epochs = 1
logging_dir = "logs"
"""

FORK_FILE = """
anima_transformer = "models/anima.safetensors"
pretrained_model_name_or_path = "models/anima.safetensors"
vae = "models/qwen_image_vae.safetensors"
qwen = "models/text_encoders"
t5_tokenizer_dir = "models/t5"
auto_download_t5_tokenizer = true
network_module = "networks.lokr_anima"
network_dim = 100000
network_alpha = 16
network_args = ["lokr_factor=8", "train_norm=true"]
train_norm = true
output_dir = "output"
output_name = "lokr"
save_model_as = "safetensors"
save_every_n_epochs = 1
max_train_epochs = 10
learning_rate = 0.0001
lr_scheduler = "constant"
lr_warmup_steps = 0
train_batch_size = 8
gradient_accumulation_steps = 4
mixed_precision = "bf16"
gradient_checkpointing = true
cache_latents = true
xfomers = true
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.01", "eps=1e-08", "betas=(0.9,0.95)"]
anima_timestep_sampling = "logit_normal"
anima_monitor_memory = true
anima_monitor_alert_policy = "warn"
seed = 42
anima_seq_len = 128
anima_noise_offset = 0.0
"""

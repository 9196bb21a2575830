"""Files of the older one-file layout: one of each generation, and the command that converts them."""

from __future__ import annotations

from pathlib import Path

from anima_peft.cli import report_faults
from anima_peft.commands.migrate import migrate_file

# save_every counts epochs; t5_tokenizer_path; further sections
OLDER = """
[model]
transformer_path = '{transformer}'
vae_path = '{vae}'
text_encoder_path = '{text_encoder}'
t5_tokenizer_path = '{t5_tokenizer}'

[dataset]
data_dir = '{pictures}'
resolution = 64
min_reso = 32
max_reso = 128
reso_step = 16
max_ar = 2.0
repeats = 2
shuffle_caption = false
shuffle_caption_per_epoch = true
keep_tokens = 0
flip_augment = true
cache_latents = true
cache_dir = "cache"

[lora]
network_type = "lora"
lora_name = "old_lora"
lora_rank = 4
lora_alpha = 2
lora_dropout = 0.1
lora_targets = ""
lokr_factor = 4
lokr_use_tucker = false

[training]
epochs = 1
max_steps = 0
batch_size = 2
grad_accum = 1
grad_clip = 0.0
learning_rate = 5e-5
mixed_precision = "no"
num_workers = 0
seed = 42
resume = ""
log_every = 10
lr_scheduler = "constant"
lr_warmup_ratio = 0.05

[optimizer]
type = "adamw"
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.99
eps = 1e-8
prodigy_d_coef = 1.0

[output]
output_dir = '{output}'
save_every = 1
save_state = true
save_state_every = 0

[progress]
loss_curve_steps = 100

[wandb]
enabled = false
"""

# save_every counts steps; t5_tokenizer_dir
NEWER = """
[model]
transformer_path = '{transformer}'
vae_path = '{vae}'
text_encoder_path = '{text_encoder}'
t5_tokenizer_dir = '{t5_tokenizer}'

[dataset]
data_dir = '{pictures}'
repeats = 1
resolution = 64
min_reso = 32
max_reso = 128
reso_step = 16
caption_extension = ".txt"
keep_tokens = 0
flip_augment = false
cache_latents = true

[training]
epochs = 2
max_steps = 2
batch_size = 2
grad_accum = 1
learning_rate = 0.0001
mixed_precision = "no"
grad_checkpoint = true
num_workers = 0
persistent_data_loader_workers = true
xformers = false
seed = 42
seq_len = 256
noise_offset = 0.0
lr_scheduler = "linear"
lr_warmup_steps = 1

[lora]
network_type = "lokr"
lora_rank = 100000
lora_alpha = 100000

[optimizer]
type = "AdamW"
weight_decay = 0.01
eps = 1e-8
beta1 = 0.9
beta2 = 0.95

[output]
output_dir = '{output}'
output_name = "newer_lokr"
save_every = 200
save_state = false
"""

PLACES = {
    "transformer": "models/anima",
    "vae": "models/vae.safetensors",
    "text_encoder": "models/qwen",
    "t5_tokenizer": "models/t5",
    "pictures": "C:\\pictures\\图片",
    "output": "out",
}


def convert(*words: str | Path) -> int:
    """The exit code of the command."""
    return report_faults(lambda: migrate_file([str(word) for word in words], prog="convert"))

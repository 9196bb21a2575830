"""Effects of `ModelOptions`."""

from __future__ import annotations

from .bench import Effect

EFFECTS = {
    "anima_transformer": Effect(
        ("--anima_transformer", "{other_transformer}"),
        lambda built: (built.seen.sources.transformer.name, built.metadata["ss_sd_model_name"]),
        ("anima_miniature.safetensors", "anima_miniature.safetensors"),
        ("other_transformer.safetensors", "other_transformer.safetensors"),
    ),
    "vae": Effect(
        ("--vae", "{other_vae}"),
        lambda built: (built.seen.sources.vae.name, built.metadata["ss_vae_name"]),
        ("qwen_image_vae_miniature.safetensors", "qwen_image_vae_miniature.safetensors"),
        ("other_vae.safetensors", "other_vae.safetensors"),
    ),
    "qwen": Effect(
        ("--qwen", "{other_text_encoder}"),
        lambda built: built.seen.sources.text_encoder.name,
        "qwen_3_miniature.safetensors",
        "other_text_encoder.safetensors",
    ),
    "qwen_tokenizer_dir": Effect(
        ("--qwen_tokenizer_dir", "{other_tokenizer}"),
        lambda built: built.seen.sources.tokenizer.name,
        "qwen_tokenizer",
        "other_tokenizer",
    ),
    "t5_tokenizer_dir": Effect(
        ("--t5_tokenizer_dir", "{other_t5_tokenizer}"),
        lambda built: built.seen.sources.t5_tokenizer.name,
        "t5_tokenizer",
        "other_t5_tokenizer",
    ),
    "anima_seq_len": Effect(
        ("--anima_seq_len", "16"),
        lambda built: (built.seen.captions["max_length"], built.metadata["ss_max_token_length"]),
        (512, "512"),
        (16, "16"),
    ),
}

"""Adapters on Anima's two trainable parts: targets, injection through PEFT, file formats, metadata."""

"""Adapters for others: a folder with a model card, and hubs to push it to."""

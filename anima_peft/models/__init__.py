"""Anima's parts: where they lie, how their weights are named, how they are loaded, what goes in and out of them."""

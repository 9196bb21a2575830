"""The configuration of a run: strict TOML and flags into frozen dataclasses."""

from .loading import RunConfig, build_parser, load
from .prompts import PromptLine, parse_prompt_line
from .train import (
    FlowOptions,
    LogOptions,
    LoopOptions,
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    SaveOptions,
    TrainOptions,
)

__all__ = [
    "FlowOptions",
    "LogOptions",
    "LoopOptions",
    "ModelOptions",
    "NetworkOptions",
    "OptimizerOptions",
    "PromptLine",
    "RunConfig",
    "SaveOptions",
    "TrainOptions",
    "build_parser",
    "load",
    "parse_prompt_line",
]

"""The configuration of a run: strict TOML and flags into frozen dataclasses."""

from .loading import RunConfig, build_parser, load, load_datasets
from .network import NetworkOptions
from .optimization import EmaOptions, FlowOptions, LossOptions, OptimizerOptions, ScheduleOptions
from .prompts import PromptLine, parse_prompt_line
from .train import LogOptions, LoopOptions, ModelOptions, SaveOptions, TrainOptions

__all__ = [
    "EmaOptions",
    "FlowOptions",
    "LogOptions",
    "LoopOptions",
    "LossOptions",
    "ModelOptions",
    "NetworkOptions",
    "OptimizerOptions",
    "PromptLine",
    "RunConfig",
    "SaveOptions",
    "ScheduleOptions",
    "TrainOptions",
    "build_parser",
    "load",
    "load_datasets",
    "parse_prompt_line",
]

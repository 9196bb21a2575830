"""The optimizers, each its library's own: by name, or by the path of any class."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError

logger = logging.getLogger(__name__)

_OURS = ("self", "params", "lr")
_LOWEST_ADAPTIVE_RATE = 0.1  # below it Prodigy's own estimate of the rate comes to next to nothing


@dataclass(frozen=True)
class Source:
    """Where an optimizer comes from.

    Attributes:
        path: of its class, dotted.
        extra: ours that installs its library; "" where that is always there.
        arguments: what it is built with unless the user says otherwise.
    """

    path: str
    extra: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)


OPTIMIZERS: Mapping[str, Source] = {
    # fused: one kernel for all parameters
    "AdamW": Source("torch.optim.AdamW", arguments={"fused": True}),
    "AdamW8bit": Source("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    "PagedAdamW8bit": Source("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),
    "Lion": Source("lion_pytorch.Lion", "optimizers"),
    "Lion8bit": Source("bitsandbytes.optim.Lion8bit", "bitsandbytes"),
    "Adafactor": Source("transformers.optimization.Adafactor"),
    "Prodigy": Source("prodigyopt.Prodigy", "optimizers"),
    "AdamWScheduleFree": Source("schedulefree.AdamWScheduleFree", "optimizers"),
    "RAdamScheduleFree": Source("schedulefree.RAdamScheduleFree", "optimizers"),
    "CAME": Source("came_pytorch.CAME", "optimizers"),
}
"""Those that have a name."""


def canonical_name(written: str) -> str:
    """The name of an optimizer however it is spelled (`radam_schedulefree`); a dotted path stays as it is.

    Raises:
        InputError: neither a name nor a dotted path.
    """
    if "." in written:
        return written
    known = {_bare(name): name for name in OPTIMIZERS}
    if _bare(written) in known:
        return known[_bare(written)]
    in_torch = next((name for name in dir(torch.optim) if _bare(name) == _bare(written)), None)
    hint = f'; PyTorch\'s own is "torch.optim.{in_torch}"' if in_torch else ""
    raise InputError(
        f'expected one of {", ".join(OPTIMIZERS)}, or the path of a class such as "torch.optim.NAdam", '
        f'got "{written}"{hint}'
    )


def _bare(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def load_class(path: str, extra: str = "") -> type:
    """The class at a dotted path.

    Raises:
        InputError: its library is not installed, or there is no such class in it.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        install = f"pip install anima-peft[{extra}]" if extra else f"pip install the package that holds {package}"
        raise InputError(f"{path} needs a package that is not installed ({error}); {install}") from error
    if not isinstance(found, type):
        raise InputError(f"there is no class {path}")
    return found


def class_path(name: str) -> str:
    """The dotted path behind a name of `OPTIMIZERS`."""
    return OPTIMIZERS[name].path if name in OPTIMIZERS else name


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name of `OPTIMIZERS` or a dotted path.

    Raises:
        InputError: as `load_class`, or it is no optimizer, or one whose steps evaluate the loss by themselves.
    """
    source = OPTIMIZERS.get(name, Source(name))
    cls = load_class(source.path, source.extra)
    if not issubclass(cls, torch.optim.Optimizer):
        raise InputError(f"{source.path} is no torch.optim.Optimizer")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(f"{source.path} evaluates the loss several times a step, which training does not do")
    return cls


def keywords(cls: type) -> tuple[tuple[str, ...], bool]:
    """The names of the arguments that an optimizer's or a schedule's class takes, and whether it takes any other."""
    parameters = inspect.signature(cls).parameters.values()
    named = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return tuple(name for name in named if name not in _OURS), any(p.kind is p.VAR_KEYWORD for p in parameters)


def is_schedule_free(cls: type) -> bool:
    """Whether it averages the weights instead of following a schedule (Defazio et al. 2024).

    Between steps its parameters are not the average; `eval()` and `train()` change from one to the other.
    """
    return callable(getattr(cls, "eval", None)) and callable(getattr(cls, "train", None))


def sets_own_rate(cls: type, arguments: Mapping[str, object]) -> bool:
    """Whether it is an Adafactor that works out its rate by itself, from the number of steps."""
    default = inspect.signature(cls).parameters.get("relative_step")
    return default is not None and bool(arguments.get("relative_step", default.default))


def takes_one_rate(cls: type, arguments: Mapping[str, object]) -> bool:
    """Whether all parameters must have the same rate: Prodigy estimates a single one, as does such an Adafactor."""
    return "d_coef" in keywords(cls)[0] or sets_own_rate(cls, arguments)


def needs_card(name: str) -> bool:
    """Whether it pages its state between a graphics card and the host, and without a card would not do what it says."""
    return class_path(name).startswith("bitsandbytes.optim.Paged")


def build_optimizer(
    name: str, groups: Iterable[Mapping[str, Any]], learning_rate: float, arguments: Mapping[str, object]
) -> torch.optim.Optimizer:
    """Build the optimizer of a run, and say where its rate is not what one would expect.

    Args:
        name: of `OPTIMIZERS`, or a dotted path.
        groups: parameter groups, with an `lr` where it is not `learning_rate`, and a `weight_decay` of 0 for those
            that get none.
        arguments: keyword values for the class.

    Raises:
        InputError: the class cannot be had, or refuses an argument.
    """
    cls = optimizer_class(name)
    if "d_coef" in keywords(cls)[0] and learning_rate < _LOWEST_ADAPTIVE_RATE:
        logger.warning("%s multiplies its own rate by learning_rate = %g; 1.0 is usual.", name, learning_rate)
    if sets_own_rate(cls, arguments):
        logger.warning(
            "%s sets its own rate, and learning_rate is not used; optimizer_args relative_step=False uses it.", name
        )
    return construct(name, groups, learning_rate, arguments)


def construct(
    name: str, groups: Iterable[Mapping[str, Any]], learning_rate: float, arguments: Mapping[str, object]
) -> torch.optim.Optimizer:
    """As `build_optimizer`, without a word."""
    cls = optimizer_class(name)
    given: dict[str, Any] = (
        dict(OPTIMIZERS[name].arguments) if name in OPTIMIZERS and not arguments.get("foreach") else {}
    )
    given |= arguments
    own_rate, decays = sets_own_rate(cls, given), "weight_decay" in keywords(cls)[0]
    dropped = {key for key, needless in (("lr", own_rate), ("weight_decay", not decays)) if needless}
    prepared = [{key: value for key, value in group.items() if key not in dropped} for group in groups]
    try:
        return cls(prepared, lr=None if own_rate else learning_rate, **given)  # type: ignore[call-arg]
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"{name} cannot be built with {_listed(given)}: {error or type(error).__name__}") from error


def _listed(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in arguments.items()) or "no arguments"

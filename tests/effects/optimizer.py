"""Effects of `OptimizerOptions`."""

from __future__ import annotations

from .bench import Built, Effect, Refused

LINEAR = ("--lr_scheduler", "linear")


def rates(built: Built) -> list[float]:
    return built.rates()


EFFECTS = {
    "optimizer_type": Refused(("--optimizer_type", "SGD"), 'expected "AdamW", got "SGD"'),
    "betas": Effect(
        ("--optimizer_args", "betas=0.8,0.9"), lambda built: built.optimizer["betas"], (0.9, 0.999), (0.8, 0.9)
    ),
    "weight_decay": Effect(
        ("--optimizer_args", "weight_decay=0.5"), lambda built: built.optimizer["weight_decay"], 0.01, 0.5
    ),
    "eps": Effect(("--optimizer_args", "eps=1e-4"), lambda built: built.optimizer["eps"], 1e-8, 1e-4),
    "learning_rate": Effect(("--learning_rate", "0.001"), rates, [0.005] * 4, [0.001] * 4),
    "lr_scheduler": Effect(LINEAR, rates, [0.005] * 4, [0.005, 0.00375, 0.0025, 0.00125]),
    "lr_warmup_steps": Effect(
        ("--lr_warmup_steps", "2"),
        rates,
        [0.005, 0.00375, 0.0025, 0.00125],
        [0.0, 0.0025, 0.005, 0.0025],
        LINEAR,
    ),
    "lr_scheduler_num_cycles": Effect(
        ("--lr_scheduler_num_cycles", "2"),
        rates,
        [0.005, 0.004268, 0.0025, 0.000732],
        [0.005, 0.0025, 0.005, 0.0025],
        ("--lr_scheduler", "cosine_with_restarts"),
    ),
    "lr_scheduler_power": Effect(("--lr_scheduler_power", "2"), rates, beside=("--lr_scheduler", "polynomial")),
    "max_grad_norm": Effect(("--max_grad_norm", "0.5"), lambda built: built.seen.loop["max_grad_norm"], 1.0, 0.5),
}

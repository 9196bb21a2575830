"""Changing an option changes what it should, and no option is without a case."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import tests.effects
from anima_peft.config.dataset_options import BatchKeys, DatasetKeys, PlaceKeys, SubsetKeys
from anima_peft.config.loading import OPTIONS
from anima_peft.config.options import options_of
from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from tests.config.effects import EFFECTS as OF_TRAINING

from .bench import DIFFERS, Bench, Effect, Refused

MODULES = [
    importlib.import_module(f"tests.effects.{found.name}") for found in pkgutil.iter_modules(tests.effects.__path__)
]
TABLES = {module.__name__.rpartition(".")[2]: module.EFFECTS for module in MODULES if hasattr(module, "EFFECTS")}
EFFECTS: dict[str, Effect | Refused] = {name: case for table in TABLES.values() for name, case in table.items()}
DATASET_OPTIONS = [o.name for cls in (DatasetKeys, BatchKeys, SubsetKeys, PlaceKeys) for o in options_of(cls)]


@pytest.fixture(scope="module")
def bench(miniature: MiniatureFiles, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(miniature, tmp_path_factory.mktemp("effects"))


def test_every_option_has_a_case() -> None:
    assert sum(map(len, TABLES.values())) == len(EFFECTS), "an option stands in two tables"
    assert not EFFECTS.keys() & OF_TRAINING.keys()
    assert EFFECTS.keys() | OF_TRAINING.keys() == {*OPTIONS, *DATASET_OPTIONS}


@pytest.mark.parametrize("name", EFFECTS)
def test_effect(bench: Bench, name: str) -> None:
    case = EFFECTS[name]
    if isinstance(case, Refused):
        with pytest.raises(InputError) as report:
            bench.build(case.change, dataset=case.dataset)
        assert case.message in str(report.value)
        return
    before = case.observe(bench.build(case.beside, case.without, case.base))
    words = (*_instead(case.beside, case.change), *case.change)
    after = case.observe(bench.build(words, case.without, case.dataset or case.base))
    if case.before is DIFFERS:
        assert not _equal(before, after)
    else:
        assert (before, after) == (case.before, case.after)


def _instead(beside: tuple[str, ...], change: tuple[str, ...]) -> tuple[str, ...]:
    """What stands beside without the flag, and its value, that the change sets to another."""
    if not change or change[0] not in beside:
        return beside
    place = beside.index(change[0])
    return (*beside[:place], *beside[place + len(change) :])


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.mark.parametrize("name", [name for name, case in EFFECTS.items() if isinstance(case, Effect)])
def test_the_case_sets_its_option_and_no_other(name: str) -> None:
    """Else the effect could be another's."""
    case = EFFECTS[name]
    assert isinstance(case, Effect)
    if case.dataset is not None:
        assert case.change == ()
        assert f"\n{name} = " in case.dataset
        return
    flags = [word for word in case.change if word.startswith("--")]
    inside = OPTIONS[name].rules.inside if name in OPTIONS else None
    if inside:
        (flag,) = flags
        (text,) = [word for word in case.change if not word.startswith("--")]
        assert flag == f"--{inside}"
        assert text.startswith(f"{name}=")
    else:
        assert flags in ([f"--{name}"], [f"--no-{name}"])

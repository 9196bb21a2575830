"""Random input within a share of the time: `pytest -m fuzz` takes ten minutes of a processor, all targets together.

ANIMA_FUZZ_SECONDS=1800 pytest -m fuzz                        # other time, for all targets together
ANIMA_FUZZ_SEED=7 pytest -m fuzz -k captions                  # the seed that a failure has named
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from anima_peft.errors import InputError

FUZZ = [
    pytest.mark.fuzz,
    pytest.mark.timeout(0),  # of the whole; each input has its own
    pytest.mark.filterwarnings("ignore"),  # libraries warn of what they see
    pytest.mark.usefixtures("bounded_memory"),
]
Value = TypeVar("Value")
TARGETS = 10
SECONDS = float(os.environ.get("ANIMA_FUZZ_SECONDS", "600")) / TARGETS
_ROUND = 100  # examples, between two looks at the clock
_LONGEST_MESSAGE = 20_000
_DEADLINE = 20_000  # ms for one example; a machine may have other work


def fuzz(inputs: st.SearchStrategy[Value], check: Callable[[Value], object], known: Iterable[Value] = ()) -> None:
    """Hold random inputs against `check` until the target's time is up; first those that failed once.

    Args:
        inputs: what to draw.
        check: raises for a fault of ours.
        known: inputs that were faults, and are not any more.
    """
    first = int(os.environ.get("ANIMA_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    end, rounds = time.monotonic() + SECONDS, 0
    while rounds == 0 or time.monotonic() < end:
        number = first + rounds

        def run(value: Value) -> None:
            check(value)

        test = given(inputs)(run)
        for value in known if rounds == 0 else ():
            test = example(value)(test)
        test = settings(
            max_examples=_ROUND,
            deadline=_DEADLINE,
            database=None,
            print_blob=False,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(test)
        try:
            seeded(number)(test)()
        except BaseException:
            print(f"to repeat it: ANIMA_FUZZ_SEED={number}")
            raise
        rounds += 1
    print(f"{rounds * _ROUND} inputs, seeds {first} to {first + rounds - 1}")


@st.composite
def mutated(draw: st.DrawFn, originals: tuple[bytes, ...]) -> bytes:
    """A file with some of its bytes changed, left out, repeated or put in."""
    data = bytearray(draw(st.sampled_from(originals)))
    header = min(len(data), 400)  # where most of what is read by hand stands
    for _ in range(draw(st.integers(1, 6))):
        limit = draw(st.sampled_from((header, len(data) or 1)))
        place = draw(st.integers(0, max(limit - 1, 0)))
        kind = draw(st.integers(0, 5))
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            data[place : place + 1] = draw(st.binary(max_size=4))
        elif kind == 2:
            del data[place : place + draw(st.integers(1, 64))]
        elif kind == 3:
            data[place:place] = data[place : place + draw(st.integers(1, 64))]
        elif kind == 4:
            data[place : place + 4] = draw(st.sampled_from(_NUMBERS))
        else:
            del data[place:]
    return bytes(data)


_NUMBERS = (bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1", b"9999", b"-1,0", b'"":[')
texts = st.text(st.characters() | st.sampled_from("{}|,\n\\\"'[]=#\0\x1b\ud800\udfff\u202e\u2028\x85"), max_size=60)
"""Whatever Python takes for a text, halves of surrogate pairs among it."""
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
"""Whatever JSON and TOML can hold, and NaN."""


@contextlib.contextmanager
def faults_are_told() -> Iterator[None]:
    """Lets through what the documentation says, in a message of bounded length."""
    told: list[InputError] = []
    try:
        yield
    except InputError as error:
        told.append(error)
    assert all(0 < len(str(error)) < _LONGEST_MESSAGE for error in told)

"""The benchmarks run and report what they say; their figures are not judged here."""

from __future__ import annotations

import json
import mmap
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import candidates, growth_start, lokr, step, tokens
from benchmarks.__main__ import BENCHMARKS, main, parse
from benchmarks.measure import PeakMemory, median_ratio, paired_times, saved_bytes
from benchmarks.reporting import Row, case_table


def test_lokr_reports_every_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lokr, "SHAPES", ((64, 128),))
    words = ["lokr", "--tokens", "8", "--dtype", "float32", "--rounds", "2", "--device", "cpu"]
    main([*words, "--json", str(tmp_path / "a.json")])
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert written["command"].startswith("python -m benchmarks lokr --tokens 8")
    assert written["versions"]["torch"] == version("torch")
    rows = written["benchmarks"]["lokr"]
    assert [row["name"] for row in rows] == list(lokr.LAYERS)
    by_name = {row["name"]: row for row in rows}
    assert by_name["base"]["ratio"] == by_name["LoRA r16"]["figures"]["/ LoRA"] == 1
    # LoRA keeps its input and a narrow intermediate; ours besides them one more of the input's size at most.
    mib = 8 * 64 * 4 / 2**20
    saved = {name: row["figures"]["saved MiB"] for name, row in by_name.items()}
    assert saved["base"] == 0
    assert saved["ours full"] <= saved["LoRA r16"] + mib
    assert saved["PEFT full"] > 64 * 128 * 4 / 2**20, "PEFT keeps the product itself"
    assert "64->128, 8 tokens, float32" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["benchmarks.md", "benchmarks.zh-CN.md"])
def test_the_page_names_every_benchmark(page: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    assert {row.split("`")[1] for row in text.splitlines() if row.startswith("| `")} == BENCHMARKS.keys()


@pytest.mark.parametrize("name", [*BENCHMARKS, "all"])
def test_every_benchmark_says_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse([name, "--help"])
    assert "--size {miniature,full}" in capsys.readouterr().out


def test_without_a_name_all_run_at_miniature_size() -> None:
    assert vars(parse([])) == vars(parse(["all"]))
    assert (parse(["--rounds", "3"]).benchmark, parse(["--rounds", "3"]).rounds) == ("all", 3)
    assert parse(["all", "--device", "cuda"]).size == "miniature"
    assert {parse([name, "--device", "cuda"]).size for name in BENCHMARKS} == {"full"}
    assert {parse([name, "--device", "cpu"]).size for name in BENCHMARKS} == {"miniature"}


def test_a_table_shows_only_columns_with_figures() -> None:
    rows = [
        Row("case", "one", 12.34, "ms", 1.0, "one", peak_bytes=2**20),
        Row("case", "two", 0.012345, "ms", 1.5, "one", figures={"share": 0.25}),
    ]
    assert [line.split() for line in case_table(rows).splitlines()] == [
        ["ms", "/", "one", "peak", "MiB", "share"],
        ["-" * 35],
        ["one", "12.3", "1.00", "1.0"],
        ["two", "0.0123", "1.50", "0.25"],
    ]


def test_peak_memory_sees_what_is_gone_again() -> None:
    size = 2**27
    with PeakMemory(torch.device("cpu")) as memory:
        block = mmap.mmap(-1, size)  # memory that the process cannot have had before
        block.write(bytes(size))
        time.sleep(0.2)  # it is looked for a hundred times a second
        block.close()
    assert 0.9 * size < memory.above < 2 * size


def test_saved_bytes_counts_what_the_backward_pass_needs() -> None:
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(8, 4)
    assert saved_bytes(lambda: (x @ weight).tanh(), {weight.untyped_storage().data_ptr()}) == 2 * 8 * 4 * 4


def test_ratios_are_taken_within_a_round() -> None:
    times = {"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}
    assert median_ratio(times, "a", "b") == 2.0
    calls: list[str] = []
    measured = paired_times({n: lambda n=n: calls.append(n) for n in "ab"}, 2, torch.device("cpu"))  # type: ignore[misc]
    assert calls == list("ababab")
    assert {name: len(values) for name, values in measured.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("backend", [None, pytest.param("eager", marks=pytest.mark.slow)])
def test_step_measures_ours_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    monkeypatch.setattr(step, "product_rate", lambda *_: 1e9)
    compiling = [] if backend is None else ["--compile", backend]
    words = ["step", "--heads", "1", "--blocks", "1", "--tokens", "2", "2", "--rounds", "1", "--device", "cpu"]
    main([*words, *compiling, "--precision", "bf16", "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["benchmarks"]["step"]
    times = {row["name"]: row for row in rows if row["ratio"] is not None}
    ours = [
        name
        for network in ("LoRA", "LoKr")
        for name in (f"ours {network}", f"ours {network}, compiled")
        if backend is not None or "compiled" not in name
    ]
    assert list(times) == ["no adapter", "PEFT LoRA", "PEFT LoKr", "LyCORIS LoKr", *ours]
    assert times["PEFT LoRA"]["ratio"] == times["ours LoRA"]["figures"]["/ ours LoRA"] == 1
    assert times["PEFT LoKr"]["figures"]["added"] == 1
    assert all(row["figures"]["share of peak"] > 0 for row in times.values())
    parts = [row for row in rows if row["ratio"] is None]
    assert [row["name"] for row in parts] == ours
    names = {f"{part} ms" for part in ("forward", "backward", "optimizer", "logging", "data, loop")}
    for row in parts:
        assert row["figures"].keys() == names
        assert sum(row["figures"].values()) == pytest.approx(row["median"])


def test_step_goes_on_without_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(step, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(candidates, "_lycoris", too_large)
    words = ["step", "--heads", "1", "--blocks", "1", "--tokens", "2", "2", "--rounds", "1", "--device", "cpu"]
    main([*words, "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["benchmarks"]["step"]
    (unfit,) = (row for row in rows if row["name"] == "LyCORIS LoKr")
    assert (unfit["median"], unfit["figures"]) == (None, {"share of peak": "does not fit"})
    assert sum(row["ratio"] is not None for row in rows) == 5
    monkeypatch.setattr(candidates, "_peft", lambda _: too_large)
    with pytest.raises(SystemExit, match="PEFT LoRA, which all are compared with, does not fit"):
        main(words)


def test_tokens_measures_growth_beside_arithmetic(tmp_path: Path) -> None:
    words = ["tokens", "--heads", "1", "--blocks", "1", "--sides", "4", "2", "--rounds", "1", "--device", "cpu"]
    main([*words, "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["benchmarks"]["tokens"]
    assert [row["name"] for row in rows] == ["4 tokens", "16 tokens"] * len(tokens.NAMES)
    for small, large in zip(rows[::2], rows[1::2], strict=True):
        assert (small["ratio"], small["figures"]["time / arithmetic"]) == (1, 1)
        assert large["figures"]["tokens"] == 4
        assert 1 < large["figures"]["arithmetic"] < 5


def test_memory_measures_each_option_beside_the_plain_step(tmp_path: Path) -> None:
    words = ["memory", "--rounds", "1", "--device", "cpu", "--precision", "no", "--only", "low", "balanced, nf4"]
    main([*words, "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["benchmarks"]["memory"]
    assert [row["name"] for row in rows] == ["fast", "low", "balanced, nf4"]
    assert (rows[0]["ratio"], rows[1]["figures"]["off by"]) == (1, "0.0e+00")


def test_growth_measures_a_start_from_a_complete_cache(tmp_path: Path) -> None:
    growth_start.build(tmp_path, 20)
    start = growth_start.start(tmp_path)
    assert start.pictures == 20
    assert min(start.seconds, start.scan, start.step, start.late_step, start.late_start, start.metadata) > 0

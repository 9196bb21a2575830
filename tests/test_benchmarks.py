"""The benchmarks run and report what they say; their figures are not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import lokr
from benchmarks.measure import median_ratio, paired_times, saved_bytes


def test_lokr_reports_every_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lokr, "SHAPES", ((64, 128),))
    words = ["--tokens", "8", "--dtype", "float32", "--rounds", "2", "--device", "cpu"]
    lokr.main([*words, "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["rows"]
    assert [row["adapter"] for row in rows] == list(lokr.LAYERS)
    by_name = {row["adapter"]: row for row in rows}
    assert by_name["base"]["over base"] == by_name["LoRA r16"]["over LoRA"] == 1
    # LoRA keeps its input and a narrow intermediate; ours besides them one more of the input's size at most.
    mib = 8 * 64 * 4 / 2**20
    assert by_name["base"]["saved MiB"] == 0
    assert by_name["ours full"]["saved MiB"] <= by_name["LoRA r16"]["saved MiB"] + mib
    assert by_name["PEFT full"]["saved MiB"] > 64 * 128 * 4 / 2**20, "PEFT keeps the product itself"
    assert "64->128, 8 tokens, float32" in capsys.readouterr().out


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

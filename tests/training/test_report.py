"""The page about a run: that it is whole, stands alone, stays small, and shows others' text as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anima_peft.cli import DONE, FAULTY_INPUT, main
from anima_peft.errors import InputError, TrainingError
from anima_peft.files import save_tensors
from anima_peft.training import report as module
from anima_peft.training.outputs import Outputs
from anima_peft.training.record import Record, recording
from anima_peft.training.report import reporting, write_report
from anima_peft.training.report.charts import charts_of
from anima_peft.training.report.curves import axis, smooth, thin
from anima_peft.training.report.page import config_lines
from anima_peft.training.report.pictures import BUDGET, SIDE, embed
from anima_peft.training.run import train

from .conftest import Configure

HOSTILE = """</script><script>alert(1)</script>"'><img src=http://evil/x onerror=alert(2)>{{ 7919 * 6131 }} 図"""
VOID = {"meta", "link", "input", "img", "path"}


class Reader(HTMLParser):
    """Notes elements, attributes and text, and that all elements are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1] in ("script", "style")):
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def no_step(record: Record) -> None:
    """Nothing more is logged."""


def write_run(
    folder: Path, name: str = "test", text: str = "a prompt", more: Callable[[Record], None] = no_step, side: int = 64
) -> Outputs:
    """A run's files without a run: a record of 30 steps, six previews, a comparison and an adapter's metadata."""
    outputs, record, facts = (
        Outputs(folder, name),
        Record(Outputs(folder, name).record),
        {
            "name": name,
            "version": "1",
            "total_steps": 40,
            "overview": [["model", text], ["adapter", "LoRA"]],
            "pictures": [["dataset", "bucket"], ["0", text], ["", "1 sizes"]],
            "notes": [text],
            "config": f'learning_rate = 0.5  # command line\nseed = 42  # default\ncomment = "{text}"  # file',
        },
    )
    generator = np.random.default_rng(0)
    (folder / "sample").mkdir(parents=True, exist_ok=True)
    with recording(record):
        record.begin(0, facts, continued=False)
        for step in range(1, 31):
            record.log({"loss": 1 / step, "lr": 1e-4, "samples_per_second": 2.0, "peak_memory_gib": 6.5}, step=step)
            record.warning(text)
            if step % 5 == 0:
                noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
                noise.save(outputs.preview(step, 1))
                record.preview(step, f"preview 1: {text}", outputs.preview(step, 1))
                losses = {f"validation/sigma_{sigma}": sigma / step for sigma in (0.1, 0.5, 0.9)}
                record.log({**losses, "validation/loss": 0.5 / step}, step=step)
        for label in ("without", "with"):
            noise.save(outputs.compared(1, label))
        record.compared(text, outputs.compared(1, "without"), outputs.compared(1, "with"))
        more(record)
    save_tensors(outputs.final, {}, {"modelspec.title": text})
    return outputs


def test_a_run_ends_with_its_page(configure: Configure, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red circle --w 32 --h 32 --s 1 --l 1\n", encoding="utf-8")
    previews = ["--sample_prompts", str(prompts), "--sample_at_first", "--sample_every_n_steps", "2"]
    measured = ["--validation_split", "0.25", "--validate_every_n_steps", "2"]
    compared = ["--compare_prompts", "blue square --w 32 --h 32 --s 1 --l 1"]
    result = train(configure("--max_train_steps", "4", *previews, *measured, *compared))
    page = read(result.report)
    headings = ["Loss", "Validation loss by noise level", "Learning rate", "Gradient norm", "Samples per second"]
    shown = ["Finished", "4 / 4", "preview 1: red circle", "blue square", "64 x 64", "learning_rate = 0.005"]
    shown += ["command line", "ss_network_dim", "LoRA, rank 4, alpha 1", "Held out for validation", "test.safetensors"]
    assert [text for text in (*headings, *shown) if text not in page.text] == []
    assert [text for text in ("曲线", "数据集", "配置", "已完成") if text not in page.text] == []
    assert len(page.named("img")) == 3 + 2
    assert all(image["src"].startswith("data:image/webp") and image["alt"] for image in page.named("img"))  # type: ignore[union-attr]


def test_others_text_is_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = read(write_report(write_run(tmp_path, text=HOSTILE)))
    assert len(page.named("script")) == 1
    assert str(7919 * 6131) not in page.text
    assert page.text.count(HOSTILE) >= 6  # overview, warning, table, note, option, metadata, prompts
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), tag
        assert tag not in ("iframe", "object", "embed", "base", "form")
    style = files(module).joinpath("page.css").read_text(encoding="utf-8")
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_it_can_be_used_without_sight_or_mouse(tmp_path: Path) -> None:
    page = read(write_report(write_run(tmp_path)))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    plots = [attributes for _, attributes in page.elements if attributes.get("class") == "plot"]
    assert len(plots) == 5
    assert all(plot["tabindex"] == "0" and plot["aria-labelledby"] in ids for plot in plots)
    assert all(json.loads(str(plot["data-points"]))["lines"] for plot in plots)
    assert page.named("html") == [{"lang": "en"}]
    assert "Loss: from 1 at step 1 to 0.04" in page.text
    for _, attributes in page.elements:
        if attributes.get("class") in ("scroll", "strip"):
            assert attributes["tabindex"] == "0"


def test_pictures_of_elsewhere_or_gone_are_not_shown(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "text.png").write_text("no picture", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "other_kind.png", format="TIFF")  # as EPS, which starts a program
    for file in ("../private.png", str(tmp_path / "private.png"), "text.png", "other_kind.png", "gone.png", ""):
        assert embed(tmp_path / "run", file, 10_000) is None
    outputs = write_run(tmp_path / "run")
    outputs.preview(5, 1).unlink()
    assert "not there any more" in read(write_report(outputs)).text


def test_pictures_are_made_small(tmp_path: Path) -> None:
    """Noise, which compresses worst."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    for limit in (200_000, 10_000, 10):
        embedded = embed(tmp_path, "a.png", limit)
        assert embedded is not None
        assert (embedded.width, embedded.height) == (600, 900)
        assert len(embedded.source) < max(limit, 2_000) * 4 / 3 + 100
    assert BUDGET * 4 / 3 < 5e6
    assert SIDE <= 512


def test_a_long_run_makes_a_small_page() -> None:
    values = {step: 0.1 + 0.05 * np.sin(step / 1000) for step in range(1, 100_001)}
    values[50_000] = 40.0
    charts = charts_of(dict.fromkeys(("loss", "lr", "gradient_norm", "samples_per_second"), values))
    size = sum(len(chart.data) + sum(len(curve.path) + len(curve.band) for curve in chart.curves) for chart in charts)
    assert size < 300_000
    loss = json.loads(charts[0].data)["lines"][0]
    assert (loss["steps"][-1], len(loss["steps"])) == (100_000, 400)
    assert charts[0].cut == 1
    assert max(loss["values"]) < 0.5


def test_curves_are_what_they_say() -> None:
    assert smooth([1.0] * 5, 3) == pytest.approx([1.0] * 5)
    assert smooth([1.0, 0.0], 2) == pytest.approx([1.0, 1 / 3])  # weights 1/2 and 1/4 over 3/4
    line = thin("a", range(1, 11), [float(n) for n in range(10)], most=5)
    assert (line.steps, line.values) == ([2, 4, 6, 8, 10], [0.5, 2.5, 4.5, 6.5, 8.5])
    assert (line.low, line.high) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
    assert thin("a", [], []).steps == []


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 0.003, [0, 0.001, 0.002, 0.003]), (5, 5, None)],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float] | None) -> None:
    found = axis(low, high)
    assert 3 <= len(found.ticks) <= 7
    assert found.low <= found.ticks[0] < found.ticks[-1] <= found.high + 1e-9
    if ticks is not None:
        assert found.ticks == pytest.approx(ticks)
    assert axis(0, 3, 5, whole=True).ticks == [0, 1, 2, 3]


def test_where_options_come_from() -> None:
    lines = config_lines('a = "x  # y"  # command line\nb = 1  # default, without effect\n# c: not set\n[table]')
    assert [(line.text, line.origin, line.is_default) for line in lines] == [
        ('a = "x  # y"', "command line", False),
        ("b = 1", "default, without effect", True),
        ("# c: not set", "", True),
        ("[table]", "", False),
    ]


def test_the_command_at_any_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    one, two = tmp_path / "一 run", tmp_path / "two"
    outputs = write_run(one, "图 lora")
    assert main(["report", str(one)]) == DONE
    assert capsys.readouterr().out == f"{outputs.report}\n"
    # One that was killed: no end, the last line cut off, no adapter.
    lines = outputs.record.read_text(encoding="utf-8").splitlines()
    outputs.record.write_text("\n".join([*lines[:-1], lines[-1][:9]]), encoding="utf-8")
    outputs.final.unlink()
    assert main(["report", str(one)]) == DONE
    assert "At work, or cut off" in read(outputs.report).text
    assert "1 lines of the record could not be read" in read(outputs.report).text
    write_run(two, "a")
    write_run(two, "b")
    for words, message in (
        ([str(two)], "several runs; choose one by --name: a, b"),
        ([str(two), "--name", "c"], "has no c-log.jsonl; there are a, b"),
        ([str(empty)], "no record of a run"),
        ([str(empty / "gone")], "no such folder"),
    ):
        assert main(["report", *words]) == FAULTY_INPUT
        assert message in capsys.readouterr().err
    assert main(["report", str(two), "--name", "b"]) == DONE
    assert not (two / "a-report.html").exists()


@pytest.mark.parametrize("inside", [None, InputError("a fault")])
def test_a_report_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, inside: Exception | None
) -> None:
    """The adapter is safe; what went wrong inside is not hidden."""

    def full(outputs: Outputs) -> Path:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "write_report", full)
    outputs = Outputs(tmp_path, "test")
    record = Record(outputs.record)

    @reporting(record, outputs)
    def work() -> None:
        record.begin(0, {}, continued=False)
        record.log({"loss": 1.0}, step=1)
        if inside is not None:
            raise inside

    with pytest.raises(TrainingError if inside is None else InputError) as error:
        work()
    if inside is None:
        assert "test.safetensors is saved; its report could not be written (No space left" in str(error.value)
    else:
        assert "No space left" in caplog.text

"""`anima-peft share`: the card, the folder, and both hubs on the loopback."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from PIL import Image

from anima_peft.models.hub_folders import Hub
from anima_peft.sharing import hubs
from anima_peft.sharing.card import Card, Example, escaped, model_card
from tests.adapters.commanding import contents, run, tensor_file
from tests.hub_server import HubServer, alone, hub_server

# huggingface_hub 2.4 hands files to httpx in a way that httpx deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

STEM = "lora_unet_blocks_0_self_attn_q_proj"
LORA = {f"{STEM}.lora_down.weight": torch.ones(2, 64), f"{STEM}.lora_up.weight": torch.ones(64, 2)}
TEXT = {"ss_steps": "100", "ss_dataset_dirs": "C:/私/pictures", "modelspec.title": "My | <title>"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Both hubs, empty, without the repo."""
    alone(monkeypatch, tmp_path / "libraries")
    with hub_server({"hf": {}, "ms": {}}) as state:
        monkeypatch.setattr(hubs, "HfApi", functools.partial(HfApi, endpoint=state.url))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", state.url)
        state.absent = {"hf", "ms"}
        yield state


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tensor_file(LORA, tmp_path / "我的 lora.safetensors", TEXT)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two pictures, one of them with a suffix that is not its own, and a text."""
    folder = tmp_path / "pictures 图"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "b.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "a.png", format="JPEG")
    (folder / "a.txt").write_text("caption")
    return folder


@pytest.mark.parametrize(
    ("hub", "visibility"),
    [("huggingface", None), ("huggingface", "--public"), ("modelscope", None), ("modelscope", "--public")],
)
def test_pushed(
    hub: str, visibility: str | None, server: HubServer, adapter: Path, pictures: Path, capfd, caplog
) -> None:
    options = ["--private"] if visibility is None and hub == "modelscope" else [visibility] if visibility else []
    prompts = ["--prompts", "1girl, *solo*", "two\nlines"]
    arguments = ["share", adapter, "--repo", "o/r", "--license", "mit", "--hub", hub, "--images", pictures]
    assert run(*arguments, *prompts, *options) == 0
    short = {"huggingface": "hf", "modelscope": "ms"}[hub]
    files = server.files[short]
    assert sorted(files) == sorted(["README.md", adapter.name, "images/01.jpg", "images/02.png"])
    assert files[adapter.name] == adapter.read_bytes()
    assert files["images/02.png"] == (pictures / "b.png").read_bytes()
    public = visibility == "--public"
    made = server.created[short]
    assert (
        made["visibility" if short == "hf" else "Visibility"]
        == {
            "hf": "public" if public else "private",
            "ms": 5 if public else 1,
        }[short]
    )
    printed = "".join(capfd.readouterr())
    assert f"o/r ({'public' if public else 'private'})" in printed
    assert f"Bearer {'hf_secret' if short == 'hf' else 'ms-secret'}" in server.tokens
    assert "secret" not in printed + caplog.text
    before = dict(files)
    assert run(*arguments) == 2  # nothing is replaced unasked
    assert "already; choose another --repo or add --overwrite" in capfd.readouterr().err
    assert files == before
    assert run(*arguments, "--title", "Anew", "--overwrite") == 0
    assert "# Anew" in server.files[short]["README.md"].decode()
    assert "as visible as it was" in capfd.readouterr().out


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
@pytest.mark.parametrize(("place", "status"), [("create", 401), ("create", 403), ("commit", 403)])
def test_refusals(hub: str, place: str, status: int, server: HubServer, adapter: Path, capfd, caplog) -> None:
    """One message with the cause, exit code 1, and no token in it."""
    server.faults[f"{'hf' if hub == 'huggingface' else 'ms'} {place}"] = status
    assert run("share", adapter, "--repo", "o/r", "--license", "mit", "--hub", hub) == 1
    printed = "".join(capfd.readouterr())
    assert "does not take o/r" in printed
    assert "token with write access" in printed
    assert "secret" not in printed + caplog.text


def test_a_dry_run_writes_the_folder_and_asks_nobody(
    server: HubServer, adapter: Path, pictures: Path, tmp_path: Path
) -> None:
    arguments = ["share", adapter, "--repo", "o/r", "--license", "other", "--images", pictures, "--dry_run"]
    assert run(*arguments) == 0
    folder = tmp_path / "我的 lora_share"
    assert sorted(contents(folder)) == sorted(["README.md", adapter.name, "images/01.jpg", "images/02.png"])
    assert server.asked == []
    assert run(*arguments) == 2  # it is not empty
    assert run(*arguments, "--overwrite") == 0
    assert run(*arguments, "--output_dir", tmp_path / "elsewhere" / "new") == 0
    assert contents(tmp_path / "elsewhere" / "new") == contents(folder)


def card(**changes: object) -> Card:
    values = {
        "repo_id": "o/r",
        "hub": Hub.HUGGING_FACE,
        "file": "a 'b' ```.safetensors",
        "title": "Title",
        "license": "other",
        "contents": "280 x LoRA of rank 16 and scale 1",
        "kind": "lora",
    }
    return Card(**(values | changes))  # type: ignore[arg-type]


def front_matter(text: str) -> dict:  # type: ignore[type-arg]
    found = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def test_the_front_matter() -> None:
    examples = [Example("01.png", 'a: "b" # c\n---\nd'), Example("02.png")]
    made = front_matter(
        model_card(card(trigger="mychar: x", license_name="own", license_link="https://x.y", examples=examples))
    )
    assert made["license"] == "other"
    assert (made["license_name"], made["license_link"]) == ("own", "https://x.y")
    assert made["base_model"] == "circlestone-labs/Anima"
    assert made["base_model_relation"] == "adapter"
    assert made["instance_prompt"] == "mychar: x"
    assert made["pipeline_tag"] == "text-to-image"
    assert made["widget"][0] == {"text": 'a: "b" # c --- d', "output": {"url": "images/01.png"}}
    assert {"lora", "anima", "text-to-image"} <= set(made["tags"])


def test_how_to_load_it() -> None:
    text = model_card(card(file="mine.safetensors", trigger="mychar", strength=0.8))
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1
    compile(code[0], "card", "exec")
    assert 'load_lora_weights("o/r", weight_name="mine.safetensors"' in code[0]
    assert 'set_adapters("it", 0.8)' in code[0]
    assert "ComfyUI/models/loras" in text
    assert "--lora_weight 'mine.safetensors' --lora_multiplier 0.8" in text
    assert "convert FILE NEW_FILE --format diffusers" in text
    assert "--format diffusers" not in model_card(card(stock_diffusers=True))
    assert 'snapshot_download("o/r")' in model_card(card(hub=Hub.MODELSCOPE))


HOSTILE = [
    "<script>alert(1)</script>",
    "[link](javascript:alert(1))",
    "![x](http://tracker/x.png)",
    "a\n\n# heading\n```\ncode",
    "| a | b |",
    "\x1b[31mred\x00",
    "---\nlicense: mit",
    "https://phishing.example",
    "&#60;b&#62;",
    "x" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_files_text_is_shown_and_does_nothing(text: str) -> None:
    shown = escaped(text)
    assert "\n" not in shown
    assert shown.isprintable()
    assert len(shown) < 2000
    assert "<" not in shown
    assert re.search(r"[\[\]()#`*_!|~^$:-]", re.sub(r"\\.", "", shown)) is None
    changes = {"title": text, "trigger": text, "file": text, "contents": text, "metadata": {"ss_steps": text}}
    whole = model_card(card(**changes, examples=[Example("1.png", text)]))
    assert front_matter(whole)["license"] == "other"
    assert sum(line.startswith("```") for line in whole.splitlines()) == 4
    compile(re.findall(r"\n```python\n(.*?)\n```\n", whole, re.DOTALL)[0], "card", "exec")
    body = whole[whole.index("\n---\n") :]
    assert "<script" not in re.sub(r"\n```.*?\n```\n|`[^`\n]*`", "", body, flags=re.DOTALL)


def test_private_metadata_stay_out_of_the_card(adapter: Path, tmp_path: Path) -> None:
    assert (
        run("share", adapter, "--repo", "o/r", "--license", "mit", "--dry_run", "--output_dir", tmp_path / "out") == 0
    )
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Steps | 100 |" in text
    assert "pictures" not in text.partition("## Training")[2]
    assert r"My \| &lt;title&gt;" in text


FAULTS = {
    "nothing there": (["{tmp}/absent.safetensors"], "no such adapter file"),
    "a folder": (["{tmp}"], "no such adapter file"),
    "no adapter": (["{tmp}/other.safetensors"], "what nobody can load is not shared"),
    "empty": (["{tmp}/empty.safetensors"], "what nobody can load is not shared"),
    "lying": (["{tmp}/lying.safetensors"], "not a readable safetensors file"),
    "no owner": (["{one}", "--repo", "name"], "expected OWNER/NAME"),
    "an address": (["{one}", "--repo", "https://huggingface.co/o/r"], "expected OWNER/NAME"),
    "path upwards": (["{one}", "--repo", "../x"], "expected OWNER/NAME"),
    "license": (["{one}", "--license", "mit\nlicense: x"], "expected an id"),
    "link": (["{one}", "--license_link", "javascript:x"], "expected an address"),
    "strength": (["{one}", "--strength", "nan"], "expected a finite number"),
    "no picture": (["{one}", "--images", "{tmp}/absent.png"], "no such file or folder"),
    "no image": (["{one}", "--images", "{one}"], "not a picture that can be read"),
    "no pictures in it": (["{one}", "--images", "{tmp}"], "no .png, .jpg or .webp"),
    "prompts alone": (["{one}", "--prompts", "x"], "has no effect without --images"),
    "prompts too many": (["{one}", "--images", "{pictures}", "--prompts", "x", "y", "z"], "give one for each"),
    "both": (["{one}", "--public", "--private"], "not allowed with"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(
    fault: str, server: HubServer, adapter: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    tensor_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "lying.safetensors").write_bytes(adapter.read_bytes()[:-4])
    arguments, message = FAULTS[fault]
    filled = [text.format(tmp=tmp_path, one=adapter, pictures=pictures) for text in arguments]
    for option, value in (("--repo", "o/r"), ("--license", "mit")):
        filled += [] if option in filled else [option, value]
    before = contents(tmp_path)
    assert run("share", *filled) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert server.asked == []


def test_without_a_token_nothing_is_asked(server: HubServer, adapter: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(hubs, "get_token", lambda: None)
    assert run("share", adapter, "--repo", "o/r", "--license", "mit") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert server.asked == []


def test_offline_nothing_is_asked(adapter: Path, capsys) -> None:
    assert run("share", adapter, "--repo", "o/r", "--license", "mit") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err

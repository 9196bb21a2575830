"""Files of prompts: the three forms say the same, and faults name file and place."""

from __future__ import annotations

from pathlib import Path

import pytest

from anima_peft.config.prompt_files import read_prompts
from anima_peft.config.prompts import PromptLine
from anima_peft.errors import InputError

EXPECTED = (
    PromptLine("1girl, solo", "blurry, worst quality", 768, 512, 7, 20, 4.5, 3.0),
    PromptLine("风景", "blurry", 64, 64, None, 20, 4.5, 2.0),
)
TEXT = """\ufeff# comment
1girl, solo --n blurry, worst quality --w 768 --h 512 --d 7 --s 20 --l 4.5

风景 --n blurry --w 64 --h 64 --s 20 --l 4.5 --fs 2
"""
TOML = """
[prompt]
sample_steps = 20
scale = 4.5
negative_prompt = "blurry"
width = 64
height = 64
[[prompt.subset]]
prompt = "1girl, solo"
negative_prompt = "blurry, worst quality"
width = 768
height = 512
seed = 7
[[prompt.subset]]
prompt = "风景"
flow_shift = 2
"""
JSON = """[
 {"prompt": "1girl, solo", "negative_prompt": "blurry, worst quality", "width": 768, "height": 512, "seed": 7,
  "sample_steps": 20, "scale": 4.5},
 {"prompt": "风景", "negative_prompt": "blurry", "width": 64, "height": 64, "sample_steps": 20, "scale": 4.5,
  "flow_shift": 2}
]"""


@pytest.mark.parametrize(("suffix", "text"), [(".txt", TEXT), (".TOML", TOML), (".json", JSON)])
def test_every_form_says_the_same(suffix: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"提示 词{suffix}"
    path.write_text(text, encoding="utf-8")
    assert read_prompts(path) == EXPECTED


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a --w 64\nb --q 3 --s 0", r"(?s)p\.txt:.*line 2: unknown --q.*--s: expected an integer"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.csv", "a", r"expected a \.txt, \.toml or \.json file"),
        ("p.toml", "[prompt]\nwidth = 3", r"expected \[prompt\] with one or more \[\[prompt\.subset\]\]"),
        ("p.toml", "[[prompt.subset]]\nwidth = 64", r"prompt\.subset\[0\]: expected a table with a text `prompt`"),
        ("p.toml", '[prompt]\n[[prompt.subset]]\nprompt = "a"\nwidht = 64', r"unknown \"?'?widht.*width"),
        ("p.toml", "[prompt", "not TOML"),
        ("p.json", "{}", "expected a list of objects"),
        ("p.json", '[{"width": 64}]', r"\[0\]: expected a table with a text `prompt`"),
        ("p.json", "[", "not JSON"),
        ("p.json", '[{"prompt": "a", "width": "wide"}]', r"\[0\]: --w: expected an integer"),
    ],
)
def test_faults_name_file_and_place(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path)
    assert name in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.txt: cannot be read"):
        read_prompts(tmp_path / "nothing.txt")

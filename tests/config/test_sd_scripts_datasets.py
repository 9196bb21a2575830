"""Dataset files as sd-scripts' documentation shows them mean the same here."""

from __future__ import annotations

from pathlib import Path

import pytest

from anima_peft.data.specs import CaptionSpec, DatasetSpec, SubsetSpec

# Dataset files as sd-scripts' documentation shows them (docs/config_README-en.md, docs/masked_loss_README.md).
TWO_WAYS = r"""
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

# This is a DreamBooth-style dataset
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'C:\hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'C:\fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'C:\reg'
  class_tokens = 'human'
  keep_tokens = 1

# This is a fine-tuning dataset
[[datasets]]
resolution = [768, 768]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'C:\piyo'
  metadata_file = 'C:\piyo\piyo_md.json'
"""
THREE_RESOLUTIONS = r"""
[general]
enable_bucket = true
bucket_no_upscale = true
max_bucket_reso = 1536

[[datasets]]
resolution = 768
  [[datasets.subsets]]
  image_dir = 'C:\hoge'

[[datasets]]
resolution = 1024
skip_image_resolution = 768
  [[datasets.subsets]]
  image_dir = 'C:\hoge'

[[datasets]]
resolution = 1280
skip_image_resolution = 1024
  [[datasets.subsets]]
  image_dir = 'C:\hoge'
"""
SEPARATORS = """
[general]
flip_aug = true
color_aug = false
resolution = [1024, 1024]

[[datasets]]
batch_size = 6
enable_bucket = true
bucket_no_upscale = true
caption_extension = ".txt"
keep_tokens_separator= "|||"
shuffle_caption = true
caption_tag_dropout_rate = 0.1
secondary_separator = ";;;" # subset 側に書くこともできます / can be written in the subset side
enable_wildcard = true # 同上 / same as above

  [[datasets.subsets]]
  image_dir = "/path/to/image_dir"
  num_repeats = 1
  caption_prefix = "1girl, hatsune miku, vocaloid |||"
  caption_suffix = ", anime screencap ||| masterpiece, rating: general"
"""
MASKED = """
[[datasets]]
  [[datasets.subsets]]
  image_dir = "/path/to/image_dir"
  caption_extension = ".txt"
  conditioning_data_dir = "/path/to/mask_dir"
  num_repeats = 8
"""
IN_SD_SCRIPTS_WORDS = [
    (
        TWO_WAYS,
        (
            DatasetSpec(
                tuple(
                    SubsetSpec(
                        Path("C:\\" + name),
                        class_tokens=tokens,
                        is_reg=name == "reg",
                        captions=CaptionSpec(shuffle_caption=True, keep_tokens=keep),
                    )
                    for name, tokens, keep in (("hoge", "hoge girl", 2), ("fuga", "fuga boy", 3), ("reg", "human", 1))
                ),
                resolution=(512, 512),
                batch_size=4,
            ),
            DatasetSpec(
                (
                    SubsetSpec(
                        Path("C:\\piyo"),
                        metadata_file=Path("C:\\piyo\\piyo_md.json"),
                        captions=CaptionSpec(shuffle_caption=True, keep_tokens=1),
                    ),
                ),
                resolution=(768, 768),
                batch_size=2,
            ),
        ),
    ),
    (
        THREE_RESOLUTIONS,
        tuple(
            DatasetSpec(
                (SubsetSpec(Path("C:\\hoge")),),
                resolution=(side, side),
                enable_bucket=True,
                max_bucket_reso=1536,
                bucket_no_upscale=True,
                skip_image_resolution=skipped,
            )
            for side, skipped in ((768, None), (1024, (768, 768)), (1280, (1024, 1024)))
        ),
    ),
    (
        SEPARATORS,
        (
            DatasetSpec(
                (
                    SubsetSpec(
                        Path("/path/to/image_dir"),
                        flip_aug=True,
                        captions=CaptionSpec(
                            caption_prefix="1girl, hatsune miku, vocaloid |||",
                            caption_suffix=", anime screencap ||| masterpiece, rating: general",
                            keep_tokens_separator="|||",
                            shuffle_caption=True,
                            caption_tag_dropout_rate=0.1,
                            secondary_separator=";;;",
                            enable_wildcard=True,
                        ),
                    ),
                ),
                batch_size=6,
                enable_bucket=True,
                bucket_no_upscale=True,
            ),
        ),
    ),
    (
        MASKED,
        (
            DatasetSpec(
                (SubsetSpec(Path("/path/to/image_dir"), 8, conditioning_data_dir=Path("/path/to/mask_dir")),),
            ),
        ),
    ),
]


@pytest.mark.parametrize(
    ("text", "specs"), IN_SD_SCRIPTS_WORDS, ids=["two ways", "three resolutions", "separators", "masked"]
)
def test_files_of_sd_scripts_documentation_mean_the_same(load_with, text: str, specs: tuple[DatasetSpec, ...]) -> None:
    run = load_with({"masked_loss": True} if text is MASKED else None, text)
    assert run.datasets == specs
    # Bounds of buckets that do nothing beside bucket_no_upscale, as that documentation writes them.
    assert len(run.warnings) == (text is THREE_RESOLUTIONS)

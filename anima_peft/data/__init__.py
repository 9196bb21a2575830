"""From folders of pictures and captions to batches of cached latents and text."""

from .buckets import Placement, bucket_resolutions, place
from .cache import FileIndex, TensorCache, cache_key
from .caching import CaptionsPlan, LatentFiles, LatentsPlan, MasksPlan, plan_captions, plan_latents, plan_masks
from .caption_choice import CaptionChoice, captions_of_run, process_caption
from .dataset import BucketBatchSampler, CachedDataset, SampleKey, SampleTable, collate, stack_text
from .pictures import Picture, load_pixels, scan
from .randomness import sample_generator
from .specs import CaptionSpec, DatasetSpec, SubsetSpec

__all__ = [
    "BucketBatchSampler",
    "CachedDataset",
    "CaptionChoice",
    "CaptionSpec",
    "CaptionsPlan",
    "DatasetSpec",
    "FileIndex",
    "LatentFiles",
    "LatentsPlan",
    "MasksPlan",
    "Picture",
    "Placement",
    "SampleKey",
    "SampleTable",
    "SubsetSpec",
    "TensorCache",
    "bucket_resolutions",
    "cache_key",
    "captions_of_run",
    "collate",
    "load_pixels",
    "place",
    "plan_captions",
    "plan_latents",
    "plan_masks",
    "process_caption",
    "sample_generator",
    "scan",
    "stack_text",
]

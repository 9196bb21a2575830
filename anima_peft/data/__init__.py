"""From folders of pictures and captions to batches of cached latents and text."""

from .buckets import Placement, bucket_resolutions, place
from .cache import FileIndex, TensorCache, cache_key
from .caching import CaptionsPlan, LatentFiles, LatentsPlan, plan_captions, plan_latents
from .dataset import BucketBatchSampler, CachedDataset, collate, sample_generator
from .pictures import Picture, load_pixels, scan
from .specs import DatasetSpec, SubsetSpec

__all__ = [
    "BucketBatchSampler",
    "CachedDataset",
    "CaptionsPlan",
    "DatasetSpec",
    "FileIndex",
    "LatentFiles",
    "LatentsPlan",
    "Picture",
    "Placement",
    "SubsetSpec",
    "TensorCache",
    "bucket_resolutions",
    "cache_key",
    "collate",
    "load_pixels",
    "place",
    "plan_captions",
    "plan_latents",
    "sample_generator",
    "scan",
]

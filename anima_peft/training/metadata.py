"""What a trained file says of its training, under sd-scripts' names (`ss_*`) and the model spec's."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ..adapters.lokr import FULL_MATRIX_SENTINEL
from ..data.pictures import Picture
from ..models.sources import ModelSources
from .encoding import ModelHashes
from .optimizers import class_path
from .state import Progress

if TYPE_CHECKING:
    from ..config import TrainOptions


CONFIG_KEY = "anima_peft_config"


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run once its data and model are there.

    Attributes:
        sources: the model's files; `hashes` identifies them.
        batches_per_epoch, total_steps, epochs: the plan.
        started_at: seconds since 1970.
        session_id: sd-scripts' id of a run, a random 32-bit number in decimal.
    """

    sources: ModelSources
    hashes: ModelHashes
    batches_per_epoch: int
    total_steps: int
    epochs: int
    started_at: float = field(default_factory=time.time)
    session_id: str = field(default_factory=lambda: str(uuid.uuid4().int >> 96))


MetadataWriter = Callable[[Progress], dict[str, str]]
"""The metadata of a file saved where the run stands."""


def training_metadata(
    train: TrainOptions, dataset: Mapping[str, str], facts: RunFacts, summary: str, progress: Progress
) -> dict[str, str]:
    """All metadata of a file saved at `progress`; texts only, and nothing that the run does not know.

    `dataset` is `dataset_metadata`; `summary`, the options away from their defaults as JSON, goes into CONFIG_KEY.

    With `no_metadata`, only what describes the network is left, which every adapter file has.
    """
    if train.save.no_metadata:
        return {}
    values = {**_run(train, facts, progress), **_options(train), **_model_spec(train), CONFIG_KEY: summary, **dataset}
    return {key: value if isinstance(value, str) else str(value) for key, value in values.items() if value is not None}


def dataset_metadata(pictures: Sequence[Picture]) -> dict[str, str]:
    """What a file says of the pictures: the same at every save, and slow to count where there are many."""
    # The most frequent bucket is what the adapter has seen most of.
    width, height = Counter(picture.placement.bucket for picture in pictures).most_common(1)[0][0]
    return {
        "ss_num_train_images": str(sum(picture.num_repeats for picture in pictures if not picture.is_reg)),
        "ss_num_reg_images": str(sum(picture.num_repeats for picture in pictures if picture.is_reg)),
        "ss_dataset_dirs": json.dumps(dataset_dirs(pictures), ensure_ascii=False),
        "ss_tag_frequency": json.dumps(tag_frequency(pictures), ensure_ascii=False),
        "ss_bucket_info": json.dumps(bucket_info(pictures)),
        "ss_resolution": json.dumps(sorted({picture.placement.bucket for picture in pictures})),
        "modelspec.resolution": f"{width}x{height}",
    }


def _run(train: TrainOptions, facts: RunFacts, progress: Progress) -> Mapping[str, object]:
    return {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": time.time(),
        "ss_output_name": train.save.output_name,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.epochs,
        "ss_epoch": progress.epoch,
        "ss_steps": progress.step,
        "ss_max_train_steps": facts.total_steps,
        "ss_sd_model_name": facts.sources.transformer.name,
        # A hash of a single file; a folder has none that others would know.
        "ss_new_sd_model_hash": facts.hashes.transformer if facts.sources.transformer.is_file() else None,
        "ss_vae_name": facts.sources.vae.name,
        "ss_new_vae_hash": facts.hashes.vae if facts.sources.vae.is_file() else None,
    }


def _options(train: TrainOptions) -> Mapping[str, object]:
    network, optimizer, schedule = train.network, train.optimizer, train.schedule
    patterns = {
        name: getattr(network, name)
        for name in ("exclude_patterns", "include_patterns", "network_reg_dims", "network_reg_lrs")
    }
    network_args = {
        "target_modules": ",".join(network.target_modules),
        "train_llm_adapter": str(train.trains_conditioner),
        "train_norm": str(network.train_norm),
        "rank_dropout": str(network.rank_dropout),
        "module_dropout": str(network.module_dropout),
        "loraplus_lr_ratio": str(network.loraplus_lr_ratio),
        **{name: ",".join(texts) for name, texts in patterns.items() if texts},
    }
    if network.is_lokr:
        network_args |= {
            "factor": str(network.lokr_factor),
            "full_matrix": str(network.lokr_full_matrix or network.network_dim >= FULL_MATRIX_SENTINEL),
            "decompose_both": str(network.lokr_decompose_both),
        }
    else:
        network_args["use_dora"] = str(network.use_dora)
    return {
        "ss_learning_rate": optimizer.learning_rate,
        "ss_unet_lr": optimizer.learning_rate if optimizer.unet_lr is None else optimizer.unet_lr,
        "ss_optimizer": f"{class_path(optimizer.optimizer_type)}({','.join(optimizer.optimizer_args)})",
        "ss_lr_scheduler": schedule.lr_scheduler_type or schedule.lr_scheduler,
        "ss_lr_warmup_steps": schedule.lr_warmup_steps,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_scale_weight_norms": network.scale_weight_norms,
        "ss_ema_decay": train.ema.ema_decay if train.ema.use_ema else None,
        "ss_network_dropout": train.network.network_dropout,
        "ss_network_args": json.dumps(network_args),
        "ss_gradient_accumulation_steps": train.loop.gradient_accumulation_steps,
        "ss_gradient_checkpointing": train.loop.gradient_checkpointing,
        "ss_mixed_precision": train.loop.mixed_precision,
        "ss_seed": train.loop.seed,
        "ss_max_token_length": train.model.anima_seq_len,
        "ss_cache_latents": train.loop.cache_latents,
        "ss_prior_loss_weight": train.picture_loss.prior_loss_weight,
        **{
            f"ss_{name}": value
            for name, value in {**asdict(train.flow), **asdict(train.loss)}.items()
            if not isinstance(value, bool)
        },
        "ss_training_comment": train.save.training_comment,
    }


def _model_spec(train: TrainOptions) -> Mapping[str, object]:
    return {
        "modelspec.title": train.save.metadata_title or train.save.output_name,
        "modelspec.author": train.save.metadata_author,
        "modelspec.description": train.save.metadata_description,
        "modelspec.license": train.save.metadata_license,
        "modelspec.tags": train.save.metadata_tags,
    }


def dataset_dirs(pictures: Sequence[Picture]) -> dict[str, dict[str, int]]:
    """sd-scripts' `ss_dataset_dirs`: folder name -> repeats and number of pictures. Full paths stay private."""
    folders: dict[str, dict[str, int]] = {}
    for picture in pictures:
        entry = folders.setdefault(picture.path.parent.name, {"n_repeats": picture.num_repeats, "img_count": 0})
        entry["img_count"] += 1
    return folders


def tag_frequency(pictures: Sequence[Picture]) -> dict[str, dict[str, int]]:
    """sd-scripts' `ss_tag_frequency`: folder name -> tag -> how often, for captions separated by commas."""
    frequency: dict[str, Counter[str]] = {}
    for picture in pictures:
        tags = picture.caption.replace("\n", ",").split(",")
        frequency.setdefault(picture.path.parent.name, Counter()).update(map(str.strip, tags))
    return {folder: {tag: n for tag, n in counter.items() if tag} for folder, counter in frequency.items()}


def bucket_info(pictures: Sequence[Picture]) -> dict[str, dict[str, dict[str, object]]]:
    """sd-scripts' `ss_bucket_info`: each bucket's size and how many pictures, repeats counted."""
    counts: Counter[tuple[int, int]] = Counter()
    for picture in pictures:
        counts[picture.placement.bucket] += picture.num_repeats
    return {
        "buckets": {
            str(number): {"resolution": list(bucket), "count": count}
            for number, (bucket, count) in enumerate(sorted(counts.items()))
        }
    }

"""The older one-file layout ([model], [dataset], [lora], [training], [optimizer], [output]) under today's names.

Two generations of such files are about. They share their keys but for one: `output.save_every` counted epochs in the
older and steps in the newer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from .dataset_options import PlaceKeys
from .network import ARGUMENT_LISTS, LOKR, LORA
from .old_file import Key, OldFile, leaves, path_of
from .options import options_of
from .reading import Faults, shown
from .resolved import argument

SaveUnit = Literal["epochs", "steps"]

_TRAIN_ARGS: dict[Key, str] = {
    ("model", "transformer_path"): "anima_transformer",
    ("model", "vae_path"): "vae",
    ("model", "text_encoder_path"): "qwen",
    ("lora", "lora_rank"): "network_dim",
    ("lora", "lora_alpha"): "network_alpha",
    ("lora", "lora_dropout"): "network_dropout",
    ("output", "output_dir"): "output_dir",
    ("output", "save_state"): "save_state",
    ("training", "grad_accum"): "gradient_accumulation_steps",
    ("training", "learning_rate"): "learning_rate",
    ("training", "mixed_precision"): "mixed_precision",
    ("training", "grad_checkpoint"): "gradient_checkpointing",
    ("training", "num_workers"): "max_data_loader_n_workers",
    ("training", "persistent_data_loader_workers"): "persistent_data_loader_workers",
    ("training", "xformers"): "xformers",
    ("training", "seed"): "seed",
    ("training", "seq_len"): "anima_seq_len",
    ("training", "noise_offset"): "anima_noise_offset",
    ("training", "resume"): "resume",
    ("dataset", "cache_latents"): "cache_latents",
}
_NETWORK_ARGS = {
    "lora_targets": "target_modules",
    "lokr_factor": "lokr_factor",
    "lokr_full_matrix": "lokr_full_matrix",
    "lokr_decompose_both": "lokr_decompose_both",
    "lokr_rank_dropout": "lokr_rank_dropout",
    "lokr_module_dropout": "lokr_module_dropout",
}
_GENERAL: dict[Key, str] = {
    ("dataset", "shuffle_caption"): "shuffle_caption",
    ("dataset", "keep_tokens"): "keep_tokens",
    ("dataset", "keep_tokens_separator"): "keep_tokens_separator",
    ("dataset", "caption_extension"): "caption_extension",
    ("dataset", "flip_augment"): "flip_aug",
    ("training", "caption_tag_dropout_rate"): "caption_tag_dropout_rate",
}
_BUCKETS: dict[Key, str] = {
    ("dataset", "min_reso"): "min_bucket_reso",
    ("dataset", "max_reso"): "max_bucket_reso",
    ("dataset", "reso_step"): "bucket_reso_steps",
}
_MAX_RATIO: Key = ("dataset", "max_ar")
_DATASET: dict[Key, str] = {("dataset", "resolution"): "resolution", ("training", "batch_size"): "batch_size"}
(_IMAGE_DIR,) = (option for option in options_of(PlaceKeys) if option.name == "image_dir")
_SUBSET: dict[Key, str] = {("dataset", "data_dir"): "image_dir", ("dataset", "repeats"): "num_repeats"}

# what of [training] describes pictures, under its name in the train args
_FALLBACKS: dict[Key, str] = {
    ("training", "batch_size"): "train_batch_size",
    ("training", "caption_tag_dropout_rate"): "caption_tag_dropout_rate",
}
_OPTIMIZERS = {
    "radam_schedulefree": "RAdamScheduleFree",
    "adamw_schedulefree": "AdamWScheduleFree",
    "sgd_schedulefree": "SGDScheduleFree",
}
_PRODIGY_PREFIX = "prodigy_"
_REASONS = {
    _MAX_RATIO: "buckets are bounded by their sides; it only turned enable_bucket on",
    ("dataset", "cache_dir"): "caches lie beside the pictures; cache_dir in the train args names another place",
    ("output", "save_state_every"): "save_state saves a state with every adapter",
}
# keys by which a file is known: no train args have these names in these tables
_MARKS: tuple[Key, ...] = (
    ("model", "transformer_path"),
    ("model", "vae_path"),
    ("model", "text_encoder_path"),
    ("lora", "lora_rank"),
    ("lora", "network_type"),
    ("dataset", "data_dir"),
    ("training", "epochs"),
    ("training", "grad_accum"),
)


@dataclass(frozen=True)
class Moved:
    """A value under its new name.

    Attributes:
        name: today's name.
        value: as it stood.
        path: where it stood, for messages.
    """

    name: str
    value: object
    path: str


@dataclass
class Migration:
    """What became of a file.

    Attributes:
        train_args: the train args, in the order to write them in.
        general, dataset, subset: the tables of the dataset TOML.
        decisions: choices that were made for the user, one sentence each.
        left_out: keys that found no home, each with the reason.
    """

    train_args: list[Moved] = field(default_factory=list)
    general: list[Moved] = field(default_factory=list)
    dataset: list[Moved] = field(default_factory=list)
    subset: list[Moved] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, path: str, reason: str) -> None:
        """Take one of the train args out again, also from within a `key=value` list, by where its value stood."""
        for moved in list(self.train_args):
            if moved.path == path and moved.name not in ARGUMENT_LISTS:
                self.train_args.remove(moved)
                self.left_out[f"{path} = {shown(moved.value)}"] = reason
            elif moved.name in ARGUMENT_LISTS and isinstance(moved.value, list):
                dropped = [text for text in moved.value if f"{moved.path}.{text.partition('=')[0]}" == path]
                moved.value[:] = [text for text in moved.value if text not in dropped]
                self.left_out.update({f"{path} = {text.partition('=')[2]}": reason for text in dropped})
                if not moved.value:
                    self.train_args.remove(moved)

    def train_args_document(self) -> dict[str, object]:
        """The train args TOML."""
        return _values(self.train_args)

    def dataset_document(self) -> dict[str, object]:
        """The dataset TOML."""
        general = {"general": _values(self.general)} if self.general else {}
        return {**general, "datasets": [{**_values(self.dataset), "subsets": [_values(self.subset)]}]}

    def dataset_paths(self) -> dict[str, str]:
        """Paths in the dataset TOML -> where the values stood."""
        tables = {"general": self.general, "datasets[0]": self.dataset, "datasets[0].subsets[0]": self.subset}
        moved = {f"{table}.{entry.name}": entry.path for table, entries in tables.items() for entry in entries}
        return {"datasets[0].subsets[0].image_dir": "dataset.data_dir", **moved}


def _values(entries: list[Moved]) -> dict[str, object]:
    return {moved.name: moved.value for moved in entries}


def is_root_style(document: Mapping[str, object]) -> bool:
    """Whether a TOML file has the older one-file layout."""
    keys = dict(leaves(document))
    return any(mark in keys for mark in _MARKS)


def migrate(
    document: Mapping[str, object],
    faults: Faults,
    *,
    save_every_unit: SaveUnit | None = None,
    with_pictures: bool = True,
) -> Migration:
    """Bring a file of the older layout under today's names; values keep their types and are checked later.

    Args:
        document: the parsed TOML.
        faults: takes what cannot be converted.
        save_every_unit: what `output.save_every` counts; None decides by its size.
        with_pictures: whether [dataset] is wanted; else what [training] says of pictures goes into the train args.
    """
    old = OldFile(document, _REASONS, faults)
    result = Migration()
    _train_args(old, result, save_every_unit)
    if with_pictures:
        _pictures(old, result)
    else:
        result.train_args += [m for key, name in _FALLBACKS.items() for m in _moved(old, key, name)]
        old.drop_table("dataset", "another dataset TOML was given")
    result.left_out = old.left_out()
    return result


def _renamed(old: OldFile, table: str) -> Iterator[Moved]:
    """What of a table only changes its name."""
    for key, name in _TRAIN_ARGS.items():
        if key[0] == table:
            yield from _moved(old, key, name)


def _train_args(old: OldFile, result: Migration, save_every_unit: SaveUnit | None) -> None:
    result.train_args += [
        *_renamed(old, "model"),
        *_tokenizer(old),
        *_network(old, result),
        *_renamed(old, "lora"),
        *_network_args(old),
        *_optimizer(old),
        *_length(old),
        *_schedule(old),
        *_cycles(old),
        *_renamed(old, "training"),
        *_renamed(old, "dataset"),
        *_output_name(old),
        *_renamed(old, "output"),
        *_save_every(old, result, save_every_unit),
    ]


def _moved(old: OldFile, key: Key, name: str) -> Iterator[Moved]:
    """A value under its new name, if there is one."""
    value = old.take(key)
    if value is not None:
        yield Moved(name, value, path_of(key))


def _tokenizer(old: OldFile) -> Iterator[Moved]:
    first, second = ("model", "t5_tokenizer_dir"), ("model", "t5_tokenizer_path")
    found = list(_moved(old, first, "t5_tokenizer_dir"))
    if found:
        old.leave_out(second, f"{path_of(first)} is used")
    else:
        found = list(_moved(old, second, "t5_tokenizer_dir"))
    if not found:
        old.faults.add(
            path_of(first), f"required (or {path_of(second)}), but not given: the folder of the T5 tokenizer"
        )
    yield from found


def _network(old: OldFile, result: Migration) -> Iterator[Moved]:
    key = ("lora", "network_type")
    kind = old.text(key).strip().lower()
    module = LOKR if kind == "lokr" else LORA
    if kind not in ("lokr", "lora"):
        said = f"{path_of(key)} is missing" if not kind else f"{path_of(key)} = {shown(kind)} is neither lora nor lokr"
        result.decisions.append(f"{said}: network_module = {shown(module)}.")
    yield Moved("network_module", module, path_of(key))


def _network_args(old: OldFile) -> Iterator[Moved]:
    texts = []
    for name, new in _NETWORK_ARGS.items():
        value = old.take(("lora", name))
        if value is not None:
            texts.append(argument(new, value))
    if texts:
        yield Moved("network_args", texts, "lora")


def _optimizer(old: OldFile) -> Iterator[Moved]:
    kind = old.text(("optimizer", "type"))
    if kind:
        yield Moved("optimizer_type", _OPTIMIZERS.get(kind.strip().lower(), kind), "optimizer.type")
    texts = [
        argument(name, value)
        for name in ("weight_decay", "eps")
        if (value := old.take(("optimizer", name))) is not None
    ]
    betas = [old.take(("optimizer", name)) for name in ("beta1", "beta2")]
    if None not in betas:
        texts.append(argument("betas", tuple(betas)))
    for name, other in (("beta1", "beta2"), ("beta2", "beta1")):
        if None in betas:
            old.leave_out(("optimizer", name), f"needs optimizer.{other} beside it")
    for key in [key for key in old.values if key[0] == "optimizer" and key[-1].startswith(_PRODIGY_PREFIX)]:
        if kind.lower().startswith("prodigy"):
            texts.append(argument(key[-1].removeprefix(_PRODIGY_PREFIX), old.take(key)))
        else:
            old.leave_out(key, "belongs to Prodigy")
    if texts:
        yield Moved("optimizer_args", texts, "optimizer")


def _length(old: OldFile) -> Iterator[Moved]:
    steps, epochs = ("training", "max_steps"), ("training", "epochs")
    if old.number(steps):
        yield from _moved(old, steps, "max_train_steps")
        old.leave_out(epochs, f"{path_of(steps)} sets the length")
    else:
        yield from _moved(old, epochs, "max_train_epochs")


def _schedule(old: OldFile) -> Iterator[Moved]:
    name, floor = ("training", "lr_scheduler"), ("training", "lr_min_ratio")
    if old.number(floor) and old.take(name) == "cosine":
        yield Moved("lr_scheduler", "cosine_with_min_lr", path_of(name))
        yield from _moved(old, floor, "lr_scheduler_min_lr_ratio")
    else:
        yield from _moved(old, name, "lr_scheduler")
        if old.number(floor):
            old.leave_out(floor, f'has an effect with {path_of(name)} = "cosine" only')
    steps, ratio = ("training", "lr_warmup_steps"), ("training", "lr_warmup_ratio")
    if old.take(steps) is not None:
        yield from _moved(old, steps, "lr_warmup_steps")
        if old.number(ratio):
            old.leave_out(ratio, f"{path_of(steps)} is used")
    elif share := old.number(ratio):
        yield Moved("lr_warmup_steps", float(share), path_of(ratio))


def _cycles(old: OldFile) -> Iterator[Moved]:
    for moved in _moved(old, ("training", "lr_scheduler_num_cycles"), "lr_scheduler_num_cycles"):
        whole = isinstance(moved.value, int) and not isinstance(moved.value, bool)
        yield replace(moved, value=float(moved.value)) if whole else moved  # type: ignore[arg-type]  # an int here


def _output_name(old: OldFile) -> Iterator[Moved]:
    name, other = ("output", "output_name"), ("lora", "lora_name")
    found = list(_moved(old, name, "output_name"))
    if found:
        old.leave_out(other, f"{path_of(name)} is used")
    yield from found or _moved(old, other, "output_name")


def _save_every(old: OldFile, result: Migration, unit: SaveUnit | None) -> Iterator[Moved]:
    """Older files count epochs here, newer ones steps, and nothing in a file tells which it is but its size."""
    key, epochs_key = ("output", "save_every"), ("training", "epochs")
    every, epochs = old.number(key), old.values.get(epochs_key)
    if not every:
        return
    if unit is None:
        known = isinstance(epochs, (int, float)) and not isinstance(epochs, bool)
        unit = "epochs" if known and every <= epochs else "steps"  # type: ignore[operator]  # a number where known
        compared = f"{'not above' if unit == 'epochs' else 'above'} {path_of(epochs_key)} = {epochs}"
        why = f"is {compared}" if known else f"stands without {path_of(epochs_key)}"
        other = "steps" if unit == "epochs" else "epochs"
        result.decisions.append(
            f"{path_of(key)} = {every} {why}, so it counts {unit}: save_every_n_{unit} = {every}. "
            f"If {other} are meant, convert the file with --save_every_unit {other}."
        )
    yield Moved(f"save_every_n_{unit}", every, path_of(key))


def _pictures(old: OldFile, result: Migration) -> None:
    result.general += [m for key, name in _GENERAL.items() for m in _moved(old, key, name)]
    result.dataset += [m for key, name in _DATASET.items() for m in _moved(old, key, name)]
    bounded = [key for key in (*_BUCKETS, _MAX_RATIO) if key in old.values]
    if bounded:
        result.dataset.append(Moved("enable_bucket", True, path_of(bounded[0])))
    result.dataset += [m for key, name in _BUCKETS.items() for m in _moved(old, key, name)]
    result.subset += [m for key, name in _SUBSET.items() for m in _moved(old, key, name)]
    found = {moved.name for moved in result.subset}
    if "image_dir" not in found:
        old.faults.add("dataset.data_dir", f"required, but not given. {_IMAGE_DIR.rules.help}")
    if "num_repeats" not in found:
        result.subset.append(Moved("num_repeats", 1, "dataset.repeats"))

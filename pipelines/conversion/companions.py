"""What other programs look for beside the tars: splits for timm, features for Hugging Face `datasets`, class names.

DEST/_info.json    splits, shards and their lengths, as timm's reader of WebDataset shards has them
DEST/README.md     its front matter names splits and features for `datasets.load_dataset(DEST)`
DEST/classes.txt   a class a line, in the order of the labels
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.storage.manifest import Split

_SPLIT_NAMES = {"train": "train", "val": "validation"}  # as timm and `datasets` call them

_README = """\
Written by pss-convert. `dataset.json` lists every file with its size and checksum, this one included. The tars are
WebDataset shards: `.jpg` is the image (a PNG where the original was in a format that not every program reads), `.cls`
its label in decimal, `.lab` the label as int32 and `.sid` the number of the sample as int64, both little-endian.
"""


def companion_files(
    classes: Sequence[str], splits: Mapping[str, Split], shard_lengths: Mapping[str, Sequence[int]]
) -> dict[str, bytes]:
    """Their contents by file name; `shard_lengths` has the number of samples of every tar of a split.

    Splits without tars are in none of them. `classes.txt` is left out where a class name would break a line.
    """
    tarred = {name: split for name, split in splits.items() if split.shards}
    files = {}
    if tarred:
        files["_info.json"] = _timm_info(tarred, shard_lengths)
        files["README.md"] = _readme(classes, tarred)
    if all(name.splitlines() == [name] for name in classes):
        files["classes.txt"] = "".join(f"{name}\n" for name in classes).encode(errors="surrogateescape")
    return files


def _timm_info(splits: Mapping[str, Split], shard_lengths: Mapping[str, Sequence[int]]) -> bytes:
    described = {
        _SPLIT_NAMES[name]: {
            "name": _SPLIT_NAMES[name],
            "num_samples": split.num_samples,
            "filenames": list(split.shards),
            "shard_lengths": list(shard_lengths[name]),
        }
        for name, split in splits.items()
    }
    return (json.dumps({"splits": described}, indent=1) + "\n").encode()


def _readme(classes: Sequence[str], splits: Mapping[str, Split]) -> bytes:
    # ClassLabel wants names that differ; without that, the label stays a number.
    label: Any = "int64"
    if len(set(classes)) == len(classes):
        label = {"class_label": {"names": {str(number): name for number, name in enumerate(classes)}}}
    features = {
        "jpg": "image",
        "cls": label,
        "lab": "binary",
        "sid": "binary",
        "__key__": "string",
        "__url__": "string",
    }
    front_matter = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": _SPLIT_NAMES[name], "path": f"{name}-*.tar"} for name in splits],
            }
        ],
        "dataset_info": {"features": [{"name": name, "dtype": dtype} for name, dtype in features.items()]},
    }
    import yaml

    text = yaml.safe_dump(front_matter, sort_keys=False)  # everything but ASCII is escaped
    return f"---\n{text}---\n\n{_README}".encode()

"""Every file of a source is read or named, whatever the source looks like, and the numbers add up."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Silent, convert_folder, missing, write_folder
from PIL import Image
from test_layouts import LAYOUTS, images, jpeg, put

from pipelines.base import DataError
from pipelines.conversion.convert import convert
from pipelines.conversion.options import Options
from pipelines.sources.listing import Choice, Spool, inspect
from pipelines.storage.source import TarSource

ROOT = Path(__file__).parents[3]


def adds_up(account: dict[str, Any], splits: dict[str, int], skipped: int) -> None:
    files, samples = account["files"], account["samples"]
    not_read = sum(rule["count"] for rule in files["not_read"].values())
    assert files["found"] == files["with_samples"] + len(files["metadata"]) + not_read
    assert samples == {"found": sum(splits.values()) + skipped, **splits, "skipped": skipped}
    for rule in files["not_read"].values():
        assert len(rule["names"]) == min(rule["count"], 100)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("formats", ["dali", pytest.param("ffcv", marks=pytest.mark.exhaustive)])
def test_the_account_adds_up(name: str, formats: str, tmp_path: Path) -> None:
    if formats == "ffcv" and (why := missing("ffcv")):
        pytest.skip(why)
    (tmp_path / "src").mkdir()
    expected = LAYOUTS[name](tmp_path / "src")
    choice = expected.choice
    options = Options(
        formats=(formats,),  # type: ignore[arg-type]
        label=choice.label,
        split="train" if choice.one_split else None,
        val_fraction=0.34 if choice.held_out else None,
        jobs=1,
    )
    manifest = convert(str(tmp_path / "src"), tmp_path / "set", options, Silent())
    assert manifest is not None
    adds_up(dict(manifest.account), {split: part.num_samples for split, part in manifest.splits.items()}, 0)
    assert sum(expected.splits.values()) == manifest.account["samples"]["found"]
    written = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert written["account"] == json.loads(json.dumps(manifest.account))


def test_what_is_skipped_counts(tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 3, "b": 3})
    put(tmp_path / "src", {"a/broken.jpg": "no image", "notes.txt": "x", ".hidden": "x", "b/Thumbs.db": "x"})
    command = [sys.executable, "-m", "cli.convert", tmp_path / "src", tmp_path / "set", "--format", "dali"]
    command += ["--split", "train", "--on-error", "skip", "--ignore", "notes.*"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "files of the source: 10 found = 7 with samples + 0 used otherwise + 3 not read" in done.stdout
    assert "samples: 7 found = 6 train + 1 skipped" in done.stdout
    account = json.loads((tmp_path / "set" / "dataset.json").read_text())["account"]
    adds_up(account, {"train": 6}, 1)
    assert {rule: own["names"] for rule, own in account["files"]["not_read"].items()} == {
        "--ignore notes.*": ["notes.txt"],
        "hidden": [".hidden"],
        "left by an operating system": ["b/Thumbs.db"],
    }


# --- random trees


SPLITS = ("train", "val", "valid", "Validation", "test", "dev", "training")
CLASSES = ("cat", "dog", "Ärger", "a b", "0", "10", "2", "train wreck", "x.y", "n01440764")
NAMES = ("1.jpg", "2.JPEG", "ä.png", "b c.PNG", "h.webp", "._e.jpg", ".f.jpg")
ODD = ("no suffix", "c.jpg.txt", "d.dat", "g.heic", "i.bmp.gz")
OTHERS = ("README.md", "labels.csv", "Thumbs.db", "list.json", "LICENSE")


def random_tree(root: Path, draw: random.Random) -> None:
    """Classes, splits, stray files, links, odd names and wrong suffixes; every image is another one."""
    seed = 0

    def fill(folder: Path, count: int) -> None:
        nonlocal seed
        for name in draw.sample(NAMES, min(count, len(NAMES))) + ([draw.choice(ODD)] if draw.random() < 0.03 else []):
            folder.mkdir(parents=True, exist_ok=True)
            seed += 1
            (folder / name).write_bytes(unique(seed) if draw.random() < 0.95 else b"no image at all")

    splits = draw.sample(SPLITS, draw.choice((0, 0, 1, 2, 2, 3)))
    classes = draw.sample(CLASSES, draw.randint(1, 3))
    for split in splits or [""]:
        for name in classes if draw.random() < 0.9 else classes[1:]:
            fill(root / split / name, draw.choice((1, 2, 2, 3)))
            if draw.random() < 0.08:
                fill(root / split / name / draw.choice(("more", "images")), 1)
    if draw.random() < 0.15:
        fill(root / draw.choice(("extra", *splits, "")), 1)
    if draw.random() < 0.1:
        (root / draw.choice(("empty", "valid", f"{(splits or ['.'])[0]}/{classes[0]}/empty"))).mkdir(
            parents=True, exist_ok=True
        )
    if draw.random() < 0.1 and (inside := root / (splits or [""])[0] / classes[-1]).is_dir():
        (root / (splits or [""])[-1] / "linked").symlink_to(inside)
    for name in draw.sample(OTHERS, draw.randint(0, 2)):
        (root / name).write_text("something")
    if draw.random() < 0.1:
        (root / "link").symlink_to(draw.choice((root, root / "nowhere", Path("/etc"))))


def unique(seed: int) -> bytes:
    return jpeg(seed % 4) + seed.to_bytes(4, "big")


def readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


TABLES = ("labels.csv", "train.csv", "val_labels.txt", "sample_submission.csv", "train/labels.csv", "valid/list.txt")


def random_flat_tree(root: Path, draw: random.Random) -> dict[bytes, str]:
    """Images of one or two splits in no class folders, with tables of which some label others; what each really is."""
    truth: dict[bytes, str] = {}
    told: list[tuple[str, str, str]] = []
    for split in draw.sample(("train", "valid", "test"), draw.choice((1, 2, 2, 3))):
        between = draw.choice(("", "", "images/", f"{split}/"))
        for number in range(draw.randint(2, 5)):
            name = f"{number}.jpg" if draw.random() < 0.4 else f"{split}_{number}.jpg"
            content = unique(len(truth))
            truth[content] = draw.choice(("cat", "dog"))
            put(root, {f"{split}/{between}{name}": content})
            told.append((split, f"{split}/{between}", name))
    of = dict(zip(told, truth.values(), strict=True))
    for table in draw.sample(TABLES, draw.randint(1, 3)):
        mine = [one for one in told if one[0] in table] if draw.random() < 0.7 else []
        with_folder, wide = draw.random() < 0.4, draw.random() < 0.3
        lines = []
        for one in mine or told:
            label = of[one] if "submission" not in table else "cat"
            fields = [f"{one[1]}{one[2]}" if with_folder else one[2], *(["0"] if wide else []), label]
            lines.append((" " if table.endswith(".txt") and not wide else ",").join(fields))
        header = ["file,width,label" if wide else "file,label"] if table.endswith(".csv") else []
        if (root / table.partition("/")[0]).is_dir() or "/" not in table:
            put(root, {table: "\n".join([*header, *lines]) + "\n"})
    return truth


@pytest.mark.parametrize("first", [0, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_labels_of_text_are_never_those_of_other_images(first: int, tmp_path: Path) -> None:
    read = refused = 0
    told: list[str] = []
    for number in range(first, first + (150 if first == 0 else 3000)):
        draw, root = random.Random(number), tmp_path / f"{number}"
        truth = random_flat_tree(root, draw)
        try:
            found = inspect(str(root), Choice(held_out=draw.random() < 0.5, use_test=draw.random() < 0.1))
        except DataError as error:
            refused += 1
            told.append(str(error))
            continue
        read += 1
        listed = {name for names in found.rest.values() for name in names}
        samples = [sample for own in found.listing(Spool(root)).splits.values() for sample in own]
        for sample in samples:
            assert found.claim.classes[sample.label] == truth.pop(sample.read()), (number, sample)
        left = [path for path in root.rglob("*.jpg") if path.read_bytes() in truth]
        assert {path.relative_to(root).as_posix() for path in left} <= listed, number
        assert len(left) + len(samples) == len(list(root.rglob("*.jpg")))
        shutil.rmtree(root)
    assert min(read, refused) > (read + refused) // 10, (read, refused)
    assert all(re.search(r"--|;", sentence) for sentence in told)


@pytest.mark.parametrize("first", [0, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_no_readable_image_is_missing_without_being_named(first: int, tmp_path: Path) -> None:
    converted = refused = 0
    told: list[str] = []
    for number in range(first, first + (40 if first == 0 else 300)):
        draw, root = random.Random(number), tmp_path / f"{number}"
        (root / "src").mkdir(parents=True)
        random_tree(root / "src", draw)
        there = [
            path for path in (root / "src").rglob("*") if path.is_file() and not path.is_symlink() and readable(path)
        ]
        options = {"on_error": "skip"} | ({} if draw.random() < 0.5 else {"split": "train"})
        try:
            manifest = convert_folder(root / "src", root / "set", "dali", **options)
        except DataError as error:
            refused += 1
            told.append(str(error))
            continue
        converted += 1
        named = {
            f"{root}/src/{name}" for rule in manifest.account["files"]["not_read"].values() for name in rule["names"]
        }
        named |= {skipped["file"] for skipped in manifest.skipped}
        stored: dict[bytes, set[str]] = {}  # a link within the source makes two of one
        for split in manifest.splits:
            tars = TarSource(root / "set", split)
            for i in range(tars.num_samples):
                stored.setdefault(bytes(tars.read(i)), set()).add(manifest.classes[tars.labels[i]])
        for path in there:
            content = path.read_bytes()
            if content in stored:
                parts = path.relative_to(root / "src").parts
                assert stored[content] & {*parts[:2]}, (number, path, stored[content])
                assert stored[content] <= {*parts[:2], "linked"}
            else:
                assert str(path) in named, (number, path)
        adds_up(dict(manifest.account), {s: p.num_samples for s, p in manifest.splits.items()}, len(manifest.skipped))
        shutil.rmtree(root)
    assert min(converted, refused) > (converted + refused) // 10, told
    for sentence in told:  # what, where, and what to do
        assert re.search("--|;", sentence), sentence
        assert str(tmp_path) in sentence or "class '" in sentence, sentence


# --- two readers, or a part left out


def test_two_layouts_in_one_source_are_refused_by_name(tmp_path: Path) -> None:
    LAYOUTS["hub_repository"](tmp_path)
    images(tmp_path, ["assets/cat/1.png", "assets/dog/1.png"])
    with pytest.raises(DataError, match=r"Parquet \(data/.*\) and class folders \(assets/.*--source-format parquet or"):
        inspect(str(tmp_path), Choice())
    chosen = inspect(str(tmp_path), Choice(format="parquet"))
    assert len(chosen.rest["not of --source-format parquet"]) == 2


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"cat/1.heic": "x"}, r"cat/1\.heic is an image of a kind that is not read; turn it into JPEG or PNG"),
        ({"cat/1.avif": "x", "cat/2.avif": "x"}, r"one of 2 files that would be left out"),
        ({"more.zip": "x"}, r"more\.zip is a compressed archive; unpack it with unzip first"),
        ({"more.tar.zst": "x"}, r"unpack it with unzstd first, or leave it out with --ignore '\*\.tar\.zst'"),
        ({"x-00000-of-00002": "x"}, r"data of a kind that is not read"),
        ({"train.beton": "x"}, r"train\.beton is data of a kind that is not read"),
        ({"cat/noname": jpeg(1)}, r"cat/noname is an image by its first bytes, but not by its name"),
        ({"cat/1.txt": jpeg(1)}, r"give it the suffix of its kind, or name it with --images"),
    ],
)
def test_data_that_would_be_left_out_is_refused(files: dict[str, Any], told: str, tmp_path: Path) -> None:
    images(tmp_path, ["cat/a.jpg", "dog/a.jpg"])
    put(tmp_path, files)
    with pytest.raises(DataError, match=told):
        inspect(str(tmp_path), Choice())
    patterns = {name.rpartition("/")[2] for name in files}
    assert inspect(str(tmp_path), Choice(), ignore=tuple(patterns)).holding == 2


def test_files_without_a_suffix_can_be_named_as_images(tmp_path: Path) -> None:
    images(tmp_path, ["cat/a", "dog/b"])
    found = inspect(str(tmp_path), Choice(images="[ab]"))
    assert (found.holding, found.claim.classes) == (2, ("cat", "dog"))


@pytest.mark.parametrize("name", ["class_order", "class_level", "images", "label", "use_test"])
def test_an_option_that_a_source_does_not_read_is_refused(name: str, tmp_path: Path) -> None:
    value: Any = {"class_level": 1, "use_test": True}.get(name, "x")
    with pytest.raises(DataError, match=f"--{name.replace('_', '-')} means nothing for the handwritten digits"):
        inspect("digits", Choice(**{name: value}))


def test_the_order_of_classes_can_be_said(tmp_path: Path) -> None:
    images(tmp_path, [f"{number}/a.jpg" for number in (10, 9, 2)])
    assert inspect(str(tmp_path), Choice()).claim.classes == ("2", "9", "10")
    assert inspect(str(tmp_path), Choice(class_order="name")).claim.classes == ("10", "2", "9")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as order:
        order.write("9 nine\n10 ten\n2 two\n")
        order.flush()
        found = inspect(str(tmp_path), Choice(class_order=order.name)).claim
        assert (found.classes, list(found.splits["all"])) == (("9", "10", "2"), [0, 1, 2])
        order.write("3 three\n")
        order.flush()
        with pytest.raises(DataError, match="names '3', which is no class"):
            inspect(str(tmp_path), Choice(class_order=order.name))
    (tmp_path / "02").mkdir()
    images(tmp_path, ["02/a.jpg"])
    with pytest.raises(DataError, match=r"'02' and '2' .* are one number"):
        inspect(str(tmp_path), Choice())


def test_test_images_are_validation_only_where_it_is_said(tmp_path: Path) -> None:
    images(tmp_path, [f"{split}/{name}/{i}.jpg" for split in ("train", "test") for name in "ab" for i in range(2)])
    found = inspect(str(tmp_path), Choice()).claim
    assert (len(found.splits["val"]), found.notes) == (4, ["test becomes the validation split, as there is no other"])
    images(tmp_path, ["dev/a/1.jpg"])
    assert len(inspect(str(tmp_path), Choice()).claim.splits["val"]) == 1
    assert len(inspect(str(tmp_path), Choice(use_test=True)).claim.splits["val"]) == 4
    assert np.array_equal(inspect(str(tmp_path), Choice(use_test=True)).claim.splits["val"], [0, 0, 1, 1])

"""Every kind of source arrives with its labels, its counts and its pixels, and hostile ones are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import convert_folder, missing, picture, write_folder
from PIL import Image

from pipelines.base import DataError
from pipelines.sources.listing import Choice, Spool, inspect
from pipelines.storage.beton import RAW, stored_path
from pipelines.storage.manifest import SPLIT_ALIASES, read_manifest
from pipelines.storage.source import TarSource
from tools.real_data import unpack

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
parquet_files = pytest.importorskip("pyarrow.parquet")

Samples = dict[str, list[tuple[bytes, int]]]  # encoded images and labels by split
COUNTS = {"train": (3, 4), "val": (2, 3)}
WNIDS = ("n01440764", "n01443537")


def members_of(archive: str, count: int) -> list[bytes]:
    """The first images of the tar that an environment variable names; none where it does not."""
    if archive not in os.environ:
        return []
    images: list[bytes] = []
    with tarfile.open(os.environ[archive]) as tar:
        while len(images) < count and (member := tar.next()) is not None:
            if member.isfile() and (content := tar.extractfile(member)):
                images.append(content.read())
    return images


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Generated images, among them photographs and images of CIFAR-10 where there are some."""
    real = [*members_of("PSS_IMAGENET_SAMPLE", 4), *members_of("PSS_CIFAR10", 4)]
    result: Samples = {}
    for seed, (split, counts) in enumerate(COUNTS.items()):
        result[split] = []
        for label, count in enumerate(counts):
            for i in range(count):
                encoded = io.BytesIO()
                picture(40 + 8 * i, 56, 100 * seed + 10 * label + i).save(encoded, "JPEG", quality=92)
                result[split].append((real.pop(0) if real and i < 2 else encoded.getvalue(), label))
    return result


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def tar_bytes(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, member in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
    return content.getvalue()


def write_train_tar(root: Path, samples: Samples) -> None:
    inner = {
        f"{wnid}.tar": tar_bytes(
            {f"{wnid}_{i}.JPEG": image for i, (image, own) in enumerate(samples["train"]) if own == label}
        )
        for label, wnid in enumerate(WNIDS)
    }
    write_tar(root / "ILSVRC2012_img_train.tar", dict(reversed(inner.items())))


def val_images(samples: Samples) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i + 1:08d}.JPEG": image for i, (image, _) in enumerate(samples["val"])}


def write_devkit(root: Path, samples: Samples) -> None:
    from scipy.io import savemat

    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")]
    rows = [(1, WNIDS[1], 0), (2, WNIDS[0], 0), (3, "n00001740", 2)]  # the devkit's own numbers, and an inner node
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds)})
    truth = "".join(f"{2 - label}\n" for _, label in samples["val"])
    folder = "ILSVRC2012_devkit_t12/data"
    members = {
        f"{folder}/meta.mat": meta.getvalue(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", members, "w:gz")


def imagenet_with_devkit(root: Path, samples: Samples) -> Path:
    write_train_tar(root, samples)
    write_tar(root / "ILSVRC2012_img_val.tar", val_images(samples))
    write_devkit(root, samples)
    return root


def imagenet_with_label_file(line: Callable[[str, int], str]) -> Callable[[Path, Samples], Path]:
    def write(root: Path, samples: Samples) -> Path:
        write_train_tar(root, samples)
        (root / "val").mkdir()
        for name, image in val_images(samples).items():
            (root / "val" / name).write_bytes(image)
        labels = [label for _, label in samples["val"]]
        lines = [line(name, label) for name, label in zip(val_images(samples), labels, strict=True)]
        (root / "val_labels.txt").write_text("\n".join(lines) + "\n")
        return root

    return write


def class_folders(root: Path, samples: Samples) -> Path:
    for split, members in samples.items():
        for i, (image, label) in enumerate(members):
            folder = root / split / WNIDS[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:03d}.JPEG").write_bytes(image)
    return root


def table(members: list[tuple[bytes, int]], struct: bool) -> Any:
    images = [{"bytes": image, "path": None} if struct else image for image, _ in members]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]) if struct else pyarrow.binary()
    features = {"image": {"_type": "Image"}, "label": {"names": list(WNIDS), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema([("image", kind), ("label", pyarrow.int64())], metadata=metadata)
    return pyarrow.table({"image": images, "label": [label for _, label in members]}, schema=schema)


def parquet(struct: bool) -> Callable[[Path, Samples], Path]:
    def write(root: Path, samples: Samples) -> Path:
        (root / "data").mkdir()
        for split, alias in (("train", "train"), ("val", "validation")):
            whole = table(samples[split], struct)
            for i, rows in enumerate((whole.slice(0, 2), whole.slice(2))):
                parquet_files.write_table(rows, root / "data" / f"{alias}-{i:05d}-of-00002.parquet")
        secret = table([(image, -1) for image, _ in samples["val"]], struct)
        parquet_files.write_table(secret, root / "data" / "test-00000-of-00001.parquet")
        return root

    return write


def saved_to_disk(root: Path, samples: Samples) -> Path:
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    for split, alias in (("train", "train"), ("val", "validation")):
        folder = root / alias
        folder.mkdir()
        name = "data-00000-of-00001.arrow"
        rows = table(samples[split], True)
        with pyarrow.ipc.new_stream(str(folder / name), rows.schema) as stream:
            stream.write_table(rows, max_chunksize=2)
        state = {"_data_files": [{"filename": name}], "_indices_data_files": None}
        (folder / "state.json").write_text(json.dumps(state))
    return root


def webdataset(extension: str, encode: Callable[[int], bytes]) -> Callable[[Path, Samples], Path]:
    def write(root: Path, samples: Samples) -> Path:
        for split, members in samples.items():
            for shard in range(2):
                content: dict[str, bytes] = {}
                for i, (image, label) in list(enumerate(members))[shard::2]:
                    content[f"a/{i:05d}.jpg"] = image
                    content[f"a/{i:05d}.{extension}"] = encode(label)
                write_tar(root / f"{split}-{shard:04d}.tar", content)
        (root / "classes.txt").write_text("\n".join(WNIDS) + "\n")
        return root

    return write


KEPT = {
    "folders": class_folders,
    "devkit": imagenet_with_devkit,
    "name and wnid": imagenet_with_label_file(lambda name, label: f"{name} {WNIDS[label]}"),
    "name and number": imagenet_with_label_file(lambda name, label: f"{name} {label}"),
    "wnid per line": imagenet_with_label_file(lambda name, label: WNIDS[label]),
    "parquet": parquet(True),
    "parquet, plain bytes": parquet(False),
    "arrow": saved_to_disk,
    "tars, cls": webdataset("cls", lambda label: str(label).encode()),
    "tars, json": webdataset("json", lambda label: json.dumps({"label": label, "id": 7}).encode()),
    "tars, lab": webdataset("lab", lambda label: label.to_bytes(4, "little")),
}


@pytest.mark.parametrize("kind", KEPT)
def test_bytes_and_labels_come_through(kind: str, samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    source = KEPT[kind](tmp_path / "src", samples)
    formats = "dali" if missing("ffcv") else "ffcv,dali"
    manifest = convert_folder(source, tmp_path / "set", formats, max_size=64, store="mix")
    assert manifest.classes == WNIDS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "src"]
    for split, members in samples.items():
        assert manifest.splits[split].per_class == COUNTS[split]
        tars = TarSource(tmp_path / "set", split)
        stored = [(tars.read(i).tobytes(), int(tars.labels[i])) for i in range(tars.num_samples)]
        assert sorted(stored) == sorted(members)
        if split == "val":
            assert [label for _, label in stored] == sorted(label for _, label in members) or "tars" in kind
        if formats != "dali":
            _check_beton(tmp_path / "set" / f"{split}.beton", stored)


def _check_beton(path: Path, stored: list[tuple[bytes, int]], max_size: int = 64, every: int = 1) -> None:
    """FFCV's own reader finds the labels, and the file holds the pictures scaled down by averaging areas."""
    import cv2
    from ffcv.reader import Reader

    reader, content = Reader(str(path)), path.read_bytes()
    assert reader.metadata["f1"].tolist() == [label for _, label in stored]
    for row, (original, _) in list(zip(np.load(stored_path(path)), stored, strict=True))[::every]:
        with Image.open(io.BytesIO(original)) as image:
            pixels = np.asarray(image.convert("RGB"))
        if (ratio := max_size / max(pixels.shape[:2])) < 1:
            size = [int(ratio * side) for side in (pixels.shape[1], pixels.shape[0])]
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        payload = content[int(row["ptr"]) : int(row["ptr"] + row["size"])]
        jpeg = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
        assert payload == (pixels if row["mode"] == RAW else jpeg).tobytes()


def cifar_files(hundred: bool) -> tuple[dict[str, bytes], np.ndarray[Any, Any]]:
    data = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    if hundred:
        names = ["train", "test"]
        files = {"meta": {b"fine_label_names": [b"apple", b"bear"]}}
        key = b"fine_labels"
    else:
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        files = {"batches.meta": {b"label_names": [b"plane", b"car"]}}
        key = b"labels"
    share = len(data) // len(names)
    for i, name in enumerate(names):
        files[name] = {b"data": data[i * share : (i + 1) * share], key: [j % 2 for j in range(share)]}
    return {name: pickle.dumps(content, protocol=2) for name, content in files.items()}, data


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar_keeps_every_pixel(hundred: bool, unpacked: bool, tmp_path: Path) -> None:
    files, data = cifar_files(hundred)
    name, folder = ("cifar-100-python",) * 2 if hundred else ("cifar-10-python", "cifar-10-batches-py")
    if unpacked:
        source = tmp_path / folder
        source.mkdir()
        for file, content in files.items():
            (source / file).write_bytes(content)
    else:
        source = tmp_path / f"{name}.tar.gz"
        write_tar(source, {f"{folder}/{file}": content for file, content in files.items()}, "w:gz")
    formats = "dali" if missing("ffcv") else "ffcv,dali"
    manifest = convert_folder(source, tmp_path / "set", formats, store="raw")
    assert manifest.classes == (("apple", "bear") if hundred else ("plane", "car"))
    found = []
    for split in ("train", "val"):
        tars = TarSource(tmp_path / "set", split)
        for i in range(tars.num_samples):
            with Image.open(io.BytesIO(tars.read(i).data)) as image:
                assert image.format == "PNG"
                found.append(np.asarray(image).transpose(2, 0, 1).tobytes())
        if formats != "dali":
            stored = [(tars.read(i).tobytes(), int(tars.labels[i])) for i in range(tars.num_samples)]
            _check_beton(tmp_path / "set" / f"{split}.beton", stored)
    assert sorted(found) == sorted(row.tobytes() for row in data)


class _Hostile:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_a_pickle_cannot_run_anything(tmp_path: Path) -> None:
    files, _ = cifar_files(True)
    files["train"] = pickle.dumps({b"data": _Hostile(tmp_path / "proof")})
    write_tar(tmp_path / "cifar-100-python.tar.gz", files, "w:gz")
    with pytest.raises(DataError, match=r"train is not what CIFAR holds .*it asks for"):
        convert_folder(tmp_path / "cifar-100-python.tar.gz", tmp_path / "set", "dali")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-100-python.tar.gz"]


def _listed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir(exist_ok=True)
    inspect(str(source), Choice()).listing(Spool(tmp_path / "spool"))


@pytest.mark.parametrize("name", ["../out.jpg", "/tmp/out.jpg", "a/../../out.jpg"])
def test_members_that_point_out_of_a_tar_are_refused(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", {name: b"x"})
    with pytest.raises(DataError, match="points out of the archive"):
        _listed(tmp_path, tmp_path)


def test_links_in_a_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="is no plain file"):
        _listed(tmp_path, tmp_path)


def test_a_compressed_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.sources import archive

    monkeypatch.setattr(archive, "_MAX_EXPANDED", 1 << 20)
    with gzip.open(tmp_path / "cifar-10-python.tar.gz", "wb") as file:
        file.write(tar_bytes({"cifar-10-batches-py/data_batch_1": bytes(4 << 20)}))
    with pytest.raises(DataError, match="expands to more than"):
        _listed(tmp_path / "cifar-10-python.tar.gz", tmp_path)


def test_an_image_of_too_many_pixels_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.conversion.scan import Unreadable, check_image
    from pipelines.sources.sample import Sample

    picture(40, 40, 0).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    result = check_image(Sample("a.png", 0, str(tmp_path / "a.png")))
    assert result == Unreadable("a.png", "more than 1000 pixels")


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.97])
def test_a_truncated_tar_is_refused(cut: float, samples: Samples, tmp_path: Path) -> None:
    imagenet_with_devkit(tmp_path, samples)
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        whole = (tmp_path / name).read_bytes()
        end = len(whole.rstrip(b"\0"))
        (tmp_path / name).write_bytes(whole[: int(end * cut)])
        with pytest.raises(DataError, match=rf"{name}.*download it again"):
            _listed(tmp_path, tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_labels_that_do_not_fit(samples: Samples, tmp_path: Path) -> None:
    imagenet_with_label_file(lambda name, label: f"{name} {label}")(tmp_path, samples)
    labels = tmp_path / "val_labels.txt"
    good = labels.read_text()
    for text, message in (
        (good.replace(" 1", " 2"), "label 2, but there are 2 training classes"),
        (good.replace("0001.JPEG", "9999.JPEG"), "has no line for ILSVRC2012_val_00000001"),
        (good.split("\n", 1)[1], "has no line for ILSVRC2012_val_00000001"),
        (good.replace(" 1", " n99999999"), "which is no training class"),
    ):
        labels.write_text(text)
        with pytest.raises(DataError, match=message):
            _listed(tmp_path, tmp_path)


def test_tables_that_do_not_fit(samples: Samples, tmp_path: Path) -> None:
    whole = table(samples["train"], True)
    path = tmp_path / "train.parquet"
    for rows, message in (
        (whole.drop_columns(["label"]), "has no certain label column"),
        (whole.drop_columns(["image"]), "train.parquet is a table"),
        (table([(b"x", 5)], True), "has the label 5"),
    ):
        parquet_files.write_table(rows, path)
        (tmp_path / "spool").mkdir()
        with pytest.raises(DataError, match=message):
            _listed(path, tmp_path)
        for file in (tmp_path / "spool").iterdir():
            file.unlink()
        (tmp_path / "spool").rmdir()
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        _listed(path, tmp_path)


def test_unlabelled_or_unsplit_shards(samples: Samples, tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", {"a.jpg": samples["train"][0][0]})
    with pytest.raises(DataError, match=r"expected a \.cls"):
        _listed(tmp_path, tmp_path)
    write_tar(tmp_path / "train-0.tar", {"a.jpg": b"", "a.cls": b"dog"})
    with pytest.raises(DataError, match="holds no class number: b'dog'"):
        _listed(tmp_path, tmp_path)
    write_tar(tmp_path / "part.tar", {"a.jpg": b"", "a.cls": b"0"})
    with pytest.raises(DataError, match="of no known split"):
        _listed(tmp_path, tmp_path)


def _round_trip(folder: Path, dest: Path, split: str | None, **options: Any) -> None:
    """Both formats hold the images of class folders, in `folder` or in its folder for each split."""
    formats = "dali" if missing("ffcv") else "ffcv,dali"
    manifest = convert_folder(folder, dest, formats, split=split, **options)
    assert not manifest.transcoded
    assert not manifest.warned
    assert read_manifest(dest)[0].files == manifest.files
    for name in manifest.splits:
        images = folder if split else next(folder / alias for alias in SPLIT_ALIASES[name] if (folder / alias).exists())
        originals = sorted((path.parent.name, path.read_bytes()) for path in images.glob("*/*"))
        tars = TarSource(dest, name)
        stored = [(tars.read(i).tobytes(), int(tars.labels[i])) for i in range(tars.num_samples)]
        assert sorted((manifest.classes[label], encoded) for encoded, label in stored) == originals
        if formats != "dali":
            _check_beton(dest / f"{name}.beton", stored, 500, every=5)


@pytest.mark.skipif("PSS_IMAGENET_SAMPLE" not in os.environ, reason="PSS_IMAGENET_SAMPLE names no tar of photographs")
def test_photographs(tmp_path: Path) -> None:
    unpack(Path(os.environ["PSS_IMAGENET_SAMPLE"]), tmp_path / "src")
    (root,) = {path.parent.parent for path in (tmp_path / "src").rglob("*.JPEG")}
    _round_trip(root, tmp_path / "set", "train")


@pytest.mark.skipif("PSS_CIFAR10" not in os.environ, reason="PSS_CIFAR10 names no tar of CIFAR-10 images")
def test_cifar10(tmp_path: Path) -> None:
    """Every fiftieth image."""
    unpack(Path(os.environ["PSS_CIFAR10"]), tmp_path / "src", every=50)
    _round_trip(tmp_path / "src", tmp_path / "set", None, store="raw")
    assert len(read_manifest(tmp_path / "set")[0].classes) == 10


def test_class_folders_still_need_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1})
    with pytest.raises(DataError, match="1 images without class folders"):
        _listed(tmp_path / "a", tmp_path)

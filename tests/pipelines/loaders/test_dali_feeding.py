"""How images reach DALI's graph on a GPU, run here on the CPU: by address as by array, to the bit."""

from __future__ import annotations

import gc
import io
import shutil
import tarfile
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import convert_folder, missing, picture

from pipelines import Batch, DataConfig, DataError
from pipelines.storage.source import open_source

if reason := missing("dali") or missing("ffcv"):  # FFCV brings numba
    pytest.skip(reason, allow_module_level=True)

from nvidia.dali import fn, types

from pipelines.loaders import dali_formats, dali_loader, dali_memory
from pipelines.loaders.dali_formats import ForDali, dali_decodes
from pipelines.loaders.dali_loader import DaliLoader, InGraph, Pipeline
from pipelines.loaders.dali_memory import AddressReader, address_reader

CONFIG = DataConfig(img_size=48)
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")

Make = Callable[..., DaliLoader]

LOADERS = ("pss-DALI", "pss-read", "pss-decode", "pss-resize", "pss-check")
"""Names of threads, which begin so."""


class InGraphLoader(DaliLoader):
    """Works as on a GPU, without one."""

    def _decodes_in_graph(self) -> bool:
        return True


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of many kinds of images, of less than 4,096 bytes and of more than twice as much, and its conversion."""
    root = tmp_path_factory.mktemp("mixed")
    for split in ("train", "val"):
        for label in ("a", "b"):
            (root / "folder" / split / label).mkdir(parents=True)
            for i in range(11):
                kind = KINDS[i % len(KINDS)]
                size = 24 + 100 * (i % 3)
                image = picture(size, size + 9, 20 * (label == "b") + i + 50 * (split == "val"))
                image.save(root / "folder" / split / label / f"{i}.{kind.lower()}", kind)
    convert_folder(root / "folder", root / "set", "dali")
    lengths = [path.stat().st_size for path in (root / "folder").rglob("*.*")]
    assert min(lengths) < 4096 < 8192 < max(lengths)
    return root


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[DaliLoader] = []

    def build_one(root: Path, split: str = "train", kind: type[DaliLoader] = InGraphLoader, **options: Any) -> Any:
        settings = {"config": CONFIG, "batch_size": 6, "num_workers": 2, "train": split == "train", **options}
        made.append(kind(open_source(root, split), **settings))
        return made[-1]

    yield build_one
    for loader in made:
        loader.close()


def readers(loader: DaliLoader) -> list[AddressReader | None]:
    return [pipeline._reader for lane in loader._lanes for pipeline in lane if isinstance(pipeline, InGraph)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.index, y.index) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("decode_once", [1, 3])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("form", [pytest.param("folder", marks=pytest.mark.exhaustive), "set"])
def test_by_address_come_the_pixels_that_come_by_array(
    form: str, split: str, decode_once: int, mixed: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, decode_once=decode_once)
    by_address = make(mixed / form, split, config=config)
    monkeypatch.setattr(dali_loader, "address_reader", lambda is_wanted: None)
    by_array = make(mixed / form, split, config=config)
    assert (readers(by_array), readers(by_address)) == ([None], [address_reader(dali_decodes)])
    for epoch in range(2):
        for loader in (by_address, by_array):
            loader.set_epoch(epoch)
        expected = list(by_array)
        assert same(list(by_address), expected)
        by_address.set_epoch(epoch, 2)
        assert same(list(by_address), expected[2:])


def encoded(kind: str, **options: Any) -> bytes:
    written = io.BytesIO()
    picture(40, 48, 0).save(written, kind, **options)
    return written.getvalue()


def test_compiled_or_not_the_same_images_are_for_dali() -> None:
    reader = address_reader(dali_decodes)
    assert reader is not None
    data = [encoded(kind) for kind in KINDS] + [encoded("JPEG", progressive=True, comment=b"x" * 700)]
    data += [data[6][:length] for length in range(1, 1200, 7)] + [one[:length] for one in data[:6] for length in (1, 9)]
    frame = data[0].index(b"\xff\xc0")
    for place in range(frame - 3, frame + 6):
        data += [
            data[0][:place] + bytes([value]) + data[0][place + 1 :] for value in (0, 2, 12, 0xC2, 0xC3, 0xC9, 0xFF)
        ]
    arrays = [np.frombuffer(one, np.uint8) for one in data]
    places = np.array([one.__array_interface__["data"][0] for one in arrays]), np.array([len(one) for one in data])
    expected = [dali_decodes(one) for one in data]
    assert reader.which(*places).tolist() == expected
    assert 20 < sum(expected) < len(expected) - 20


def test_dali_gets_every_byte_and_no_other() -> None:
    reader = address_reader(dali_decodes)
    assert reader is not None
    lengths = [1, 2, 4095, 4096, 4097, 3 * 4096 - 1, 3 * 4096, 100_001]
    data = np.random.default_rng(0).integers(0, 256, max(lengths) + len(lengths), dtype=np.uint8)
    table = reader.table(data.__array_interface__["data"][0] + np.arange(len(lengths)), np.array(lengths))
    pipe = Pipeline(batch_size=len(lengths), num_threads=2, device_id=None)
    with pipe:
        pipe.set_outputs(reader(fn.external_source(source=lambda: table, batch=True, dtype=types.INT64, ndim=1)))
    pipe.build()
    for _ in range(3):
        (copies,) = pipe.run()
        for i, length in enumerate(lengths):
            assert np.array_equal(np.array(copies[i]), data[i : i + length])


@pytest.mark.parametrize("form", ["folder", "set"])
def test_the_kind_of_an_image_is_found_out_once(
    form: str, mixed: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def counted(data: Any) -> bool:
        looked.append(1)
        return dali_decodes(data)

    reader = address_reader(dali_decodes)
    assert reader is not None
    which = reader.which
    monkeypatch.setattr(dali_formats, "dali_decodes", counted)
    monkeypatch.setattr(reader, "which", lambda *places: looked.extend([1] * len(places[0])) or which(*places))
    loader = make(mixed / form, batch_size=22)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert len(list(loader)) == 1
        assert len(looked) == loader.num_samples == 22


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_not_for_dali_is_decoded_for_it_from_a_tar_too(
    split: str, mixed: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion leaves few such images, so some are named; the pixels are those of DALI's own decoder."""
    reader, decoded = address_reader(dali_decodes), []
    assert reader is not None
    expected = list(make(mixed / "set", split))
    as_ppm = dali_formats.as_ppm
    monkeypatch.setattr(reader, "which", lambda address, length: length % 2 == 0)
    monkeypatch.setattr(dali_formats, "as_ppm", lambda *given: decoded.append(given) or as_ppm(*given))
    loader = make(mixed / "set", split)
    for _ in range(2):
        assert same(list(loader), expected)
    odd = sum(len(loader.source.read(i)) % 2 for batch in expected for i in batch.index.tolist())
    assert len(decoded) == 2 * odd > 0


def test_without_numba_the_log_says_so_and_images_come_by_array(
    mixed: Path, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(make(mixed / "set"))

    def unfit(reader: AddressReader, is_wanted: Any) -> None:
        raise AttributeError("module 'numba' has no attribute 'extending'\nand more")

    monkeypatch.setattr(dali_loader, "address_reader", dali_memory.address_reader.__wrapped__)
    monkeypatch.setattr(AddressReader, "__init__", unfit)
    loader = make(mixed / "set")
    assert readers(loader) == [None]
    assert "(AttributeError: module 'numba' has no attribute 'extending'); with a GPU, install numba" in caplog.text
    assert same(list(loader), expected)
    monkeypatch.setattr(dali_memory, "knows_addresses", lambda: False)
    assert readers(make(mixed / "set")) == [None]
    assert "numba or libz.so.1 is missing" in caplog.text


@pytest.mark.parametrize("check_bytes", [True, False])
def test_a_damaged_image_in_a_tar_is_named_at_its_batch(
    check_bytes: bool, converted_root: Path, tmp_path: Path
) -> None:
    """By its checksum, or else by DALI, after the batches before it."""
    shutil.copytree(converted_root, tmp_path / "set")
    for path in (tmp_path / "set").glob("**/val-*.tar"):
        with tarfile.open(path) as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
        if "00000006.jpg" in members:
            offset, size = members["00000006.jpg"]
            with path.open("r+b") as file:
                file.seek(offset + 10)
                file.write(bytes(size - 10))
    source = open_source(tmp_path / "set", "val", check_bytes)
    loader = InGraphLoader(source, config=CONFIG, batch_size=2, train=False, num_workers=1)
    batches = iter(loader)
    assert [next(batches).index.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(DataError, match=r"00000006\.jpg has been damaged since" if check_bytes else r"00000006\.jpg"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(LOADERS)]


class Event:
    """Stands for a CUDA event: what a GPU was asked before it is done once somebody says so."""

    done = False

    def query(self) -> bool:
        return self.done


@pytest.mark.parametrize("form", ["set", pytest.param("folder", marks=pytest.mark.exhaustive)])
def test_inputs_live_until_a_gpu_has_their_outputs(
    form: str, mixed: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI copies none of them. Where an epoch is left early, they live as long as DALI's pipeline."""
    events: list[Event] = []
    fed: list[list[weakref.ref[Any]]] = []

    class Stream:
        def record_event(self) -> Event:
            events.append(Event())
            return events[-1]

    table, run = ForDali.input, Pipeline.run

    def noted(files: ForDali, *arguments: Any) -> Any:
        found, kept = table(files, *arguments)
        fed.append([weakref.ref(found), *map(weakref.ref, kept)])
        return found, kept

    monkeypatch.setattr(ForDali, "input", noted)
    monkeypatch.setattr(InGraph, "_streams", lambda pipeline: [Stream()])
    monkeypatch.setattr(Pipeline, "run", lambda pipe, stream: run(pipe))
    loader = make(mixed / form, batch_size=4)

    def alive(number: int) -> bool:
        return all(one() is not None for one in fed[number])

    batches = iter(loader)
    for taken in range(1, 4):
        next(batches)
        gc.collect()
        assert len(events) == taken
        assert all(map(alive, range(len(fed))))  # those taken, whose outputs are not there yet, and those ahead
    events[0].done = events[2].done = True
    next(batches)
    gc.collect()
    assert [alive(number) for number in range(4)] == [False, True, True, True]  # in order: 1 may be read, so 2 stays
    held: list[list[bool]] = []
    (pipeline,) = (pipeline for lane in loader._lanes for pipeline in lane if pipeline is not None)
    weakref.finalize(pipeline._pipe, lambda: held.append([alive(number) for number in range(len(fed))]))
    batches.close()  # type: ignore[attr-defined]
    gc.collect()
    assert held == [[False] + [True] * (len(fed) - 1)]  # when DALI's pipeline went, which waits for the GPU
    assert not any(map(alive, range(len(fed))))


def test_threads_end_with_the_loader(mixed: Path) -> None:
    loader = InGraphLoader(open_source(mixed / "set", "train"), config=CONFIG, batch_size=6, train=True, num_workers=2)
    assert len(list(loader)) == 3
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(LOADERS)]

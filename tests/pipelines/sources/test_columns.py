"""Names and samples by the million are what lists of them would be, in a fraction of the memory."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.columns.names import FullNames, PackedNames, packed
from pipelines.sources.columns.samples import RangeColumns, Sample, Samples, file_samples
from pipelines.sources.sample import Spool

TEXT = st.text(alphabet=st.sampled_from("ab.Jé\udc80\ud800\n\0 "), max_size=6)
ALIKE = st.builds(
    lambda names, end: [f"n01_{name}{end}" for name in names], st.lists(TEXT), st.sampled_from(["", ".J"])
)


def assert_same(found: Sequence[object], wanted: list[object]) -> None:
    assert list(found) == wanted
    assert [found[i] for i in range(len(found))] == wanted
    assert [found[i - len(found)] for i in range(len(found))] == wanted
    for wrong in (len(wanted), -len(wanted) - 1):
        with pytest.raises(IndexError):
            found[wrong]


@given(st.lists(TEXT) | ALIKE | ALIKE.map(sorted), TEXT)
def test_packed_names_are_the_same_names(names: list[str], other: str) -> None:
    found = packed(names)
    assert_same(found, list(names))
    assert list(found[1:4]) == names[1:4]
    for name in (*names, other, *(name[1:] for name in names)):
        assert (name in found) == (name in names)


@pytest.mark.parametrize("many", [4095, 4096, 4097, 9000])
def test_many_names_are_decoded_some_at_a_time(many: int) -> None:
    names = [f"{i}.jpg" for i in range(many)]
    assert isinstance(found := packed(names), PackedNames)
    assert list(found) == names


def test_what_names_have_in_common_takes_no_memory() -> None:
    names = [f"n01440764_{i}.JPEG" for i in range(20_000)]
    tracemalloc.start()
    found = packed(names)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(found) == names
    assert kept / len(names) < 5 + 1 + 4 + 1  # digits, what divides them, where they end


@given(st.lists(st.tuples(st.sampled_from(["", "a", "a/b", "b"]), st.lists(TEXT, max_size=9))))
def test_full_names_are_put_together(folders: list[tuple[str, list[str]]]) -> None:
    found, more = FullNames(), FullNames()
    for folder, names in folders:
        found.add(folder, packed(names))
        more.add(folder, packed(names))
    wanted = [f"{folder}/{name}" if folder else name for folder, names in folders for name in names]
    assert_same(found, list(wanted))
    assert list(found.in_order()) == sorted(wanted)
    assert list(found.under("/root")) == [f"/root/{name}" for name in wanted]
    more.extend(found)
    assert_same(more, wanted + wanted)


def whole_files() -> tuple[Samples, list[Sample]]:
    names, labels = [f"{i // 9}/{i}.jpg" for i in range(40)], [i // 9 for i in range(40)]
    paths = [f"/root/{name}" for name in names]
    wanted = [Sample(path, label, path) for path, label in zip(paths, labels, strict=True)]
    return file_samples(Path("/root"), names, labels), wanted


def ranges() -> tuple[Samples, list[Sample]]:
    wanted = [
        Sample(f"t{i % 3}.tar, {i}.jpg", i % 5, f"t{i % 3}.tar", i << 34, None if i % 7 == 0 else i) for i in range(40)
    ]
    columns = RangeColumns(wanted[:11])
    columns.extend(wanted[11:])
    return Samples(columns), wanted


@pytest.mark.parametrize("make", [whole_files, ranges])
def test_samples_are_made_as_they_are_asked_for(make: Callable[[], tuple[Samples, list[Sample]]]) -> None:
    samples, wanted = make()
    assert_same(samples, list(wanted))
    assert_same(samples[3:30], list(wanted[3:30]))
    assert samples.labels.tolist() == [one.label for one in wanted]
    order = np.random.default_rng(0).permutation(40).astype(np.int32)
    shuffled, expected = samples.take(order), [wanted[i] for i in order]
    assert_same(shuffled, list(expected))
    assert_same(shuffled[7:].take(order[order < 20])[2:9], [expected[7:][i] for i in order[order < 20]][2:9])
    assert_same(samples[5:].take(order[order < 9]), [wanted[5:][i] for i in order[order < 9]])
    assert shuffled[7:].labels.tolist() == [one.label for one in expected[7:]]
    assert [shuffled.name(i) for i in range(40)] == [one.name for one in expected]


@pytest.mark.parametrize("make", [whole_files, ranges])
def test_what_another_process_gets_is_its_own_samples_only(make: Callable[[], tuple[Samples, list[Sample]]]) -> None:
    samples, wanted = make()
    sent = pickle.dumps(samples[4:6])
    assert pickle.loads(sent) == wanted[4:6]
    assert len(sent) < len(pickle.dumps(wanted[4:6])) + 40


def test_labels_of_any_size_are_kept() -> None:
    wanted = [Sample("a", label, "t.tar") for label in (1, -3, 10**30, 2)]
    columns = RangeColumns(wanted[:2])
    columns.extend(wanted[2:3])
    columns.extend(wanted[3:])
    assert list(Samples(columns)) == wanted


IMAGES = [("a, row 0", 3, b"abc"), ('b"\udc80, row 1', 0, b""), ("c, row 2", -1, b"defg")]
SPOOLED = [(3, 0, 3), (0, 3, 0), (-1, 3, 4)]


@pytest.mark.parametrize("images", [IMAGES, IMAGES[1:2], []])
def test_a_spool_is_read_as_it_was_written(images: list[tuple[str, int, bytes]], tmp_path: Path) -> None:
    found = Spool(tmp_path).fill("train", images)
    assert [(one.name, one.label, one.read()) for one in found] == images
    again = Spool(tmp_path).fill("train", iter(()))  # which is not asked
    assert list(again) == list(found)
    rows = json.loads((tmp_path / "spool-train.json").read_text())
    assert [tuple(row[:2]) for row in rows] == [image[:2] for image in images]


def test_the_spool_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "spool-train").write_bytes(b"abcdefg")
    rows = [(name, *place) for (name, *_), place in zip(IMAGES, SPOOLED, strict=True)]
    (tmp_path / "spool-train.json").write_text(json.dumps(rows))
    found = Spool(tmp_path).fill("train", iter(()))
    assert [(one.name, one.label, one.read()) for one in found] == IMAGES
    (tmp_path / "spool-train.json").write_text("[]")
    assert list(Spool(tmp_path).fill("train", iter(()))) == []

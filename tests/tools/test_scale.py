"""The tables of the windowed order and of nodes: what they say is what the order does."""

from __future__ import annotations

import pytest

from tools.scale import nodes, order

SMALL = ["--samples", "12800", "--tar", "100", "--classes", "10", "--batch", "128"]


@pytest.fixture(scope="module")
def orders():
    words = [*SMALL, *["--groups", "4,16", "--windows", "1,4", "--epochs", "3"]]
    return {(row["groups"], row["window"]): row for row in order.main(words)["rows"]}


def test_a_permutation_is_what_is_compared_with(orders):
    row = orders[None, None]
    assert all(abs(row[name] - 1) < 0.1 for name in ("same_tar", "again", "classes"))
    assert (row["left_out"], row["held"]) == (0, 1)


def test_more_groups_and_larger_windows_come_nearer_to_it(orders):
    for one, other in (((4, 1), (4, 4)), ((4, 1), (16, 1)), ((16, 1), (16, 4))):
        assert orders[one]["same_tar"] > orders[other]["same_tar"]
        assert orders[one]["held"] < orders[other]["held"]
    # 32 of a batch's 128 samples come from a tar of each group, or from two where it ends.
    assert 25 < orders[4, 1]["same_tar"] < 4 * 32 * 31 / (128 * 127) / (99 / 12_799)
    assert all(0.9 < row["classes"] < 1.1 for row in orders.values()), "classes are mixed by the conversion"


def test_classes_in_order_show_what_a_conversion_that_does_not_shuffle_costs(capsys):
    words = [*SMALL, *["--groups", "4", "--windows", "1", "--epochs", "2", "--sorted"]]
    (row, _) = order.main(words)["rows"]
    assert row["classes"] > 2
    assert "10 classes in order" in capsys.readouterr().out


def test_nodes_read_their_share_once(capsys):
    found = nodes.main(
        [
            "--samples",
            "1280000",
            "--nodes",
            "1,4",
            "--gpus",
            "2",
            "--window",
            "2",
            "--image-kb",
            "100",
            "--rate",
            "1000",
        ]
    )
    one, four = found["rows"]
    assert one["tars"] == four["tars"] == 640
    assert one["read_bytes"] == [128e9, 128e9]
    assert four["read_bytes"] == [32e9, 32e9]
    assert one["cache_bytes"] == 64 * 2 * 2 * 2000 * 100e3
    assert four["cache_bytes"] == one["cache_bytes"] / 4
    assert one["epoch_seconds"] == 640
    assert one["requests_per_second"] == pytest.approx(2)
    assert four["bytes_per_second"] == pytest.approx(4 * one["bytes_per_second"])
    assert four["plan_bytes"] < one["plan_bytes"]
    assert "128 GB" in capsys.readouterr().out


def test_more_processes_than_groups_get_more_groups_and_smaller_tars():
    (row,) = nodes.main(["--samples", "1280000", "--nodes", "100", "--gpus", "8"])["rows"]
    assert row["groups"] == 800
    assert row["tar"] == 200
    assert row["batch"] % 800 == 0

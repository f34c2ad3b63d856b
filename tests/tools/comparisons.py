"""What tests of comparisons share: the smallest runs, and mistakes that are told before any of them is trained."""

from __future__ import annotations

import pytest

TINY = (
    "train.batch_size=16", "model.depth=1", "model.embed_dim=12", "model.num_heads=1", "data.img_size=16",
    "train.num_workers=1", "train.ema_decay=0",
)  # fmt: skip


def assert_refused_before_training(start, capsys, told, *words, **options):
    """`start` is what a comparison is begun with, what stands in for pss-train, and the folder of its output."""
    begin, machine, out = start
    with pytest.raises(SystemExit) as refused:
        begin(*words, **options)
    assert refused.value.code == 2
    assert told in capsys.readouterr().err
    assert not machine.called
    assert not out.exists()

"""A set may have more tars than a process may have open files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import Silent, write_folder
from warm import ROOT

from pipelines.conversion.convert import convert
from pipelines.conversion.options import Options

EPOCH = """
import os, resource, sys
from pipelines import DataConfig, build
loader = build(sys.argv[1], "train", config=DataConfig(img_size=32), batch_size=13, train=True, loader="torch",
               num_workers=2)
limit = len(os.listdir("/proc/self/fd")) + 12
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
seen = [i for batch in loader for i in batch.index.tolist()]
print(len(loader.table.entry.shards) > limit, sorted(seen) == list(range(260)))
"""


def test_an_epoch_of_more_tars_than_files_may_be_open(tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 130, "b": 130})
    options = Options(formats=("dali",), split="train", shard_size=1, jobs=2)
    convert(str(tmp_path / "src"), tmp_path / "set", options, Silent())
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, str(tmp_path / "set")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True"], done.stderr

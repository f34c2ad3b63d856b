"""What conversion, verification and each loader make of damaged and unusual files: nothing silent, nothing hanging.

The rows are in damage.py. `pytest -rA tests/test_damage_table.py` shows how many of each kind were caught.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import damage
import pytest
import warm
from conftest import missing
from damage import CHANGED, CHANGES, FILES, NAMED, RIGHT, WARNED

HERE = Path(__file__).parents[2]
COLUMNS = [column for column in ("convert", *CHANGED) if not missing(column)]


def run(columns: list[str], sets: Path, every: int) -> dict[str, dict[str, str]]:
    """What each of `columns` makes of one in `every` of its rows; each case in a process of its own."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}"}
    command = [sys.executable, "-W", "ignore", str(HERE / "damage.py"), str(sets), str(every), *columns]
    done = warm.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_damage_is_named_and_what_is_only_unusual_comes_out_right(tmp_path: Path, every: int) -> None:
    """One test, because all columns need the same sets. It prints caught of damaged, and right of harmless."""
    damage.write_sets(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        halves = [column for column in COLUMNS if column == "ffcv"], [column for column in COLUMNS if column != "ffcv"]
        first, second = pool.map(partial(run, sets=tmp_path, every=every), halves)
        seen = first | second
    expected = {column: damage.expected(column, every) for column in COLUMNS}
    assert all(set(wanted.values()) == set(damage.expected(column).values()) for column, wanted in expected.items())
    kinds = dict.fromkeys(FILES, "source image") | {row: change.file for row, change in CHANGES.items()}
    counts = [0, 0]
    for kind in dict.fromkeys(kinds.values()):
        for column in COLUMNS:
            wanted = {row: outcome for row, outcome in expected[column].items() if kinds[row] == kind}
            bad = [row for row, outcome in wanted.items() if outcome != RIGHT]
            caught = sum(seen[column][row] in (NAMED, WARNED) for row in bad)
            right = sum(seen[column][row] == RIGHT for row in wanted if row not in bad)
            if wanted:
                print(f"{kind:18} {column:14} caught {caught}/{len(bad)}, right {right}/{len(wanted) - len(bad)}")
            counts[0] += caught + right
            counts[1] += len(wanted)
    print(f"as it should be: {counts[0]}/{counts[1]}")
    assert seen == expected

"""What conversion, verification and each loader make of damaged and unusual files: nothing silent, nothing hanging.

The rows are in damage.py. `pytest -rA tests/test_damage_table.py` shows how many of each kind were caught.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import damage
import pytest
from conftest import missing
from damage import CHANGED, CHANGES, FILES, NAMED, RIGHT, WARNED

HERE = Path(__file__).parent
COLUMNS = [column for column in ("convert", *CHANGED) if not missing(column)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What each column made of its rows; each case in a process of its own."""
    sets = tmp_path_factory.mktemp("damage")
    damage.write_sets(sets)
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}"}

    def run(column: str) -> dict[str, str]:
        command = [sys.executable, "-W", "ignore", str(HERE / "damage.py"), column, str(sets)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(COLUMNS, pool.map(run, COLUMNS), strict=True))


@pytest.mark.parametrize("column", COLUMNS)
def test_damage_is_named_and_what_is_only_unusual_comes_out_right(column: str, seen: dict[str, dict[str, str]]) -> None:
    assert seen[column] == damage.expected(column)


def test_figures(seen: dict[str, dict[str, str]]) -> None:
    """Caught of damaged; what a column does not read, or what is only unusual, has to come out right."""
    kinds = dict.fromkeys(FILES, "source image") | {row: change.file for row, change in CHANGES.items()}
    total = [0, 0]
    print(f"{'':20}{'':14}named   right pixels (harmless to it)")
    for kind in dict.fromkeys(kinds.values()):
        for column in COLUMNS:
            wanted = {row: o for row, o in damage.expected(column).items() if kinds[row] == kind}
            if not wanted:
                continue
            bad = [row for row, outcome in wanted.items() if outcome in (NAMED, WARNED)]
            caught = sum(seen[column][row] in (NAMED, WARNED) for row in bad)
            harmless = [row for row in wanted if row not in bad]
            right = sum(seen[column][row] == RIGHT for row in harmless)
            print(f"{kind:20}{column:14}{caught}/{len(bad)}   {right}/{len(harmless)}")
            total[0] += caught + right
            total[1] += len(wanted)
    print(f"as they should be: {total[0]}/{total[1]}")
    assert total[0] == total[1]

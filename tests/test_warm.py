"""What is forked from a process that has imported torch is as good as what is started anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parent.parent
_ABOUT = """
import json, os, sys, threading, warnings
import torch
try:
    warnings.warn("look")
    raises = False
except UserWarning:
    raises = True
print(json.dumps({
    "words": sys.argv, "path": sys.path[:2], "folder": os.getcwd(), "environment": dict(os.environ), "name": __name__,
    "leads": os.getsid(0) == os.getpid(), "threads": torch.get_num_threads(),
    "running": len(os.listdir("/proc/self/task")),
    "open": sorted(map(int, os.listdir("/proc/self/fd")))[:3], "raises": raises,
    "warned": sys.warnoptions, "input": sys.stdin.read(), "random": torch.initial_seed(),
}))
print("said", file=sys.stderr)
"""
EITHER = pytest.mark.parametrize("module", [subprocess, warm], ids=["anew", "forked"])


def about(module, *words, **options):
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"COLOUR": "blue", "LC_ALL": "C.UTF-8"}
    done = module.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, env=environment | options.pop("more", {}),
        stdin=subprocess.DEVNULL, **options,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "said\n")
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["-c", "-m", "file"])
def test_a_process_finds_what_one_that_is_started_anew_finds(tmp_path, how):
    (tmp_path / "about.py").write_text(_ABOUT)
    words = {"-c": ["-c", _ABOUT], "-m": ["-m", "about"], "file": [str(tmp_path / "about.py")]}[how]
    options = {"cwd": tmp_path, "start_new_session": True, "more": {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}}
    anew, forked = (about(module, *words, "one", "two words", **options) for module in (subprocess, warm))
    assert forked.pop("random") != anew.pop("random")  # both by chance
    assert forked == anew
    assert anew["raises"]
    assert anew["leads"]


@EITHER
@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit()", 0, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("raise ValueError('so')", 1, "ValueError: so"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import atexit, os; atexit.register(os._exit, 9)", 9, ""),
        ("import threading, os, time; threading.Thread(target=lambda: (time.sleep(.1), os._exit(8))).start()", 8, ""),
    ],
)
def test_it_ends_as_one_that_is_started_anew(module, code, expected, words):
    done = module.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == expected
    assert words in done.stderr


@EITHER
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_reach_it_by_its_number(module, number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with module.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert int(process.stdout.readline()) == process.pid
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.05)
        process.send_signal(number)
        _, told = process.communicate(timeout=20)
    assert process.returncode == process.poll() == -number
    assert ("KeyboardInterrupt" in told) == (number == signal.SIGINT)


def test_many_at_once_are_told_apart():
    started = [
        warm.Popen([sys.executable, "-c", f"print({n}); raise SystemExit({n})"], stdout=subprocess.PIPE)
        for n in range(6)
    ]
    assert len({process.pid for process in started}) == 6
    for number, process in reversed(list(enumerate(started))):
        assert process.communicate(timeout=60) == (f"{number}\n", "")
        assert process.returncode == number

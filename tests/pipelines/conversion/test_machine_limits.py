"""What a machine runs out of, or does not have: named, and what is finished is kept."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Silent, convert_folder, missing, picture, write_folder

from pipelines.base import DataError
from pipelines.conversion import convert as conversion
from pipelines.conversion import scan
from pipelines.conversion.options import Options
from pipelines.conversion.processes import Kept, signals_later
from pipelines.conversion.verify import verify
from pipelines.storage.source import TarSource

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "cli.convert"]

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")


def run(
    *arguments: str | Path, before: list[str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(before or []), *COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


def children(pid: int) -> list[int]:
    """All processes below one."""
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [one for child in own for one in (child, *children(child))]


def workers(pid: int) -> list[int]:
    return [one for one in children(pid) if b"forkserver" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images that a conversion takes some seconds."""
    root = tmp_path_factory.mktemp("large")
    (root / "a").mkdir()
    picture(900, 900, 0).save(root / "a" / "0.png")
    for i in range(1, 100):
        (root / "a" / f"{i}.png").hardlink_to(root / "a" / "0.png")
    return root


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("ending", [pytest.param("patience", marks=pytest.mark.exhaustive), "SIGINT", "SIGTERM"])
def test_a_worker_that_stops_does_not_stop_the_conversion_for_ever(ending: str, large: Path, tmp_path: Path) -> None:
    patience = "2" if ending == "patience" else "600"
    arguments = [large, tmp_path / "set", "--format", "dali", "--split", "train", "--jobs", "2", "--patience", patience]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".set.partial/work/check-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        below = children(process.pid)
        assert below
        os.kill(max(below), signal.SIGSTOP)  # the newest is a worker
        if ending != "patience":
            process.send_signal(getattr(signal, ending))
        _, told = process.communicate(timeout=30)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    if ending == "patience":
        assert process.returncode == 2
        assert "nothing has been done for 2 s" in told
        assert told.count("the same command continues") == 2
    else:
        assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[ending]
    assert (tmp_path / ".set.partial").exists()
    deadline = time.monotonic() + 10
    while left := [pid for pid in below if Path(f"/proc/{pid}").exists() and not _is_dead(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    if ending != "patience":
        return
    options = Options(formats=("dali",), split="train", jobs=2)
    manifest = conversion.convert(str(large), tmp_path / "set", options, Silent())
    assert manifest is not None
    assert manifest.splits["train"].num_samples == 100


_ENDS = {
    "finished, its worker stopped": ("['1 + 1']", "stop_all", "finished"),
    "a worker stopped, another killed": (
        # what is done in between has the pool look at both of them
        "[f'{KILL} {STOP})', '__import__(\"time\").sleep(0.3)', f'{KILL} 9)']",
        "ignore",
        "lost",
    ),
    "interrupted, workers and fork server stopped": ("['1 + 1', '2 + 2']", "stop_all_and_interrupt", "interrupted"),
}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", _ENDS)
@pytest.mark.exhaustive
def test_no_end_waits_for_what_is_stopped(end: str) -> None:
    tasks, on_result, said = _ENDS[end]
    code = f"""
import os, signal
from multiprocessing import forkserver
from pathlib import Path
from pipelines.conversion.processes import WorkerLost, map_processes

KILL, STOP = '__import__("os").kill(__import__("os").getpid(),', int(signal.SIGSTOP)

def below(pid):
    return Path(f"/proc/{{pid}}/task/{{pid}}/children").read_text().split()

def ignore(_):
    pass

def stop_all(_):
    server = vars(forkserver._forkserver)["_forkserver_pid"]
    for pid in below(server):
        os.kill(int(pid), signal.SIGSTOP)
    return server

def stop_all_and_interrupt(_):
    os.kill(stop_all(_), signal.SIGSTOP)
    raise KeyboardInterrupt

try:
    map_processes(eval, {tasks}, 2, {on_result})
    print("finished")
except WorkerLost:
    print("lost")
except KeyboardInterrupt:
    print("interrupted")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            told, _ = process.communicate(timeout=20)  # stopped processes would hold its end, too
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (told.split(), process.returncode) == ([said], 0)


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


@needs_root
@pytest.mark.parametrize("formats", ["dali", "ffcv,dali"])
def test_a_full_disk_is_named_and_what_is_finished_is_kept(formats: str, tmp_path: Path) -> None:
    if "ffcv" in formats and (why := missing("ffcv")):
        pytest.skip(why)
    write_folder(tmp_path / "src", {"a": 60, "b": 60})
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        result = run(tmp_path / "src", small / "set", "--format", formats, "--split", "train", "--jobs", "1")
        assert result.returncode == 2
        last = result.stderr.splitlines()[-1]
        assert str(small) in last
        assert "the same command continues" in last
        subprocess.run(["mount", "-o", "remount,size=20M", small], check=True)
        again = run(tmp_path / "src", small / "set", "--format", formats, "--split", "train", "--jobs", "1")
        assert (again.returncode, "continuing" in again.stderr) == (0, True)
    finally:
        subprocess.run(["umount", small], check=True)


@needs_root
@pytest.mark.parametrize("options", ["ro", "size=4k"])
def test_shared_memory_that_cannot_be_used_is_named_or_not_needed(options: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 3, "b": 3})
    script = f'mount -t tmpfs -o {options} tmpfs /dev/shm && (head -c 4096 /dev/zero > /dev/shm/x || true) && exec "$@"'
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no private mounts here")
    result = run(
        tmp_path / "src", tmp_path / "set", "--format", "dali", "--split", "train",
        before=["unshare", "-m", "bash", "-c", script, "x"],
    )  # fmt: skip
    assert result.returncode == 0 or (result.returncode == 2 and "error: /dev/shm" in result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_conversion_goes_on_and_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_folder(tmp_path / "src", {"a": 3})
    told: list[str] = []
    options = Options(formats=("dali",), split="train")
    assert conversion.convert(str(tmp_path / "src"), tmp_path / "set", options, Silent(), told.append) is not None
    assert sum("without locks" in line for line in told) == 1
    parts = Options(formats=("dali",), split="train", part=(1, 2))
    with pytest.raises(DataError, match="without locks, which --part needs"):
        conversion.convert(str(tmp_path / "src"), tmp_path / "other", parts, Silent())


@pytest.mark.parametrize("length", [70, 110])
def test_a_long_name_of_the_temporary_folder_does_no_harm(length: int, tmp_path: Path) -> None:
    folder = tmp_path / ("t" * length)
    folder.mkdir()
    write_folder(tmp_path / "src", {"a": 3})
    arguments = (tmp_path / "src", tmp_path / "set", "--format", "dali", "--split", "train")
    result = run(*arguments, TMPDIR=str(folder))
    assert result.returncode == 0, result.stderr
    assert run(tmp_path / "set", "--verify", TMPDIR=str(folder)).returncode == 0


def test_more_tars_than_files_may_be_open(tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 130, "b": 130})
    options = Options(formats=("dali",), split="train", shard_size=1, jobs=2)
    conversion.convert(str(tmp_path / "src"), tmp_path / "set", options, Silent())
    code = (
        "import sys, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))\n"
        "from pathlib import Path; import numpy as np\n"
        "from pipelines.storage.source import TarSource\n"
        "source = TarSource(Path(sys.argv[1]), 'train')\n"
        "print(len(source.read_many(np.arange(260))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "260", done.stderr


@pytest.mark.parametrize("name", ["train-00000.tar", "train.samples.npy", "train-00000.idx"])
def test_verify_tells_what_may_not_be_read_from_damage(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 3})
    convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train")
    (tmp_path / "set" / name).chmod(0)
    drop: list[str] = []
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv")
        drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    result = run(tmp_path / "set", "--verify", before=drop)
    assert result.returncode == 2
    assert f"{name} cannot be read (permission denied)" in result.stderr


@pytest.mark.skipif(missing("ffcv") is not None, reason="FFCV is not installed")
@pytest.mark.parametrize("size", [(2, 1100), (1300, 1), (1, 501)])
def test_images_too_narrow_for_ffcv_are_found_by_the_check(size: tuple[int, int], tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 3, "b": 3})
    picture(*size, 0).save(tmp_path / "src" / "b" / "strip.png")
    with pytest.raises(DataError, match=r"1 image\(s\) cannot be used .*strip.png: too narrow"):
        convert_folder(tmp_path / "src", tmp_path / "set", "ffcv", split="train")
    manifest = convert_folder(tmp_path / "src", tmp_path / "set", "ffcv,dali", split="train", on_error="skip")
    assert [skipped["file"] for skipped in manifest.skipped] == [str(tmp_path / "src" / "b" / "strip.png")]
    assert manifest.splits["train"].num_samples == 6
    assert manifest.account["samples"] == {"found": 7, "train": 6, "skipped": 1}


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"other"), lambda path: path.unlink()])
def test_an_image_that_changes_costs_nothing_that_is_finished(
    change: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "src", {"a": 30})
    victim = tmp_path / "src" / "a" / "007.jpg"
    before = victim.read_bytes()
    checked = scan.checked_images

    def then_change(*arguments: Any) -> Any:
        if victim.exists():
            change(victim)
        return checked(*arguments)

    monkeypatch.setattr(conversion, "checked_images", then_change)
    options = Options(formats=("dali",), split="train", shard_size=5)
    with pytest.raises(Kept, match=r"007\.jpg changed while it was being converted; restore it"):
        conversion.convert(str(tmp_path / "src"), tmp_path / "set", options, Silent())
    assert (tmp_path / ".set.partial" / "set").exists()
    monkeypatch.undo()
    victim.write_bytes(before)
    conversion.convert(str(tmp_path / "src"), tmp_path / "set", options, Silent())
    verify(tmp_path / "set", 1, Silent(), full=True)
    assert TarSource(tmp_path / "set", "train").num_samples == 30


def test_a_destination_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 3})
    (tmp_path / "set").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="as a link to what is not there"):
        convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train")
    assert not list(tmp_path.glob(".*"))


def test_what_is_missing_is_noticed_before_the_first_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "src", {"a": 3})
    monkeypatch.setattr(conversion._Conversion, "run", lambda _: pytest.fail("it began"))
    for module, options in (("cv2", {"formats": ("ffcv",)}), ("ray", {"formats": ("dali",), "engine": "ray"})):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(DataError, match=rf"needs {module}; run: pip install"):
            conversion.convert(str(tmp_path / "src"), tmp_path / "set", Options(**options), Silent())  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_what_the_machine_cannot_read_is_no_unreadable_image(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or --on-error skip would leave out good images for a disk that is away for a moment."""
    picture(20, 20, 0).save(tmp_path / "a.png")

    def read(_: Any) -> bytes:
        raise OSError(number, os.strerror(number), "a.png")

    monkeypatch.setattr(scan.Sample, "read", read)
    sample = scan.Sample("a.png", 0, str(tmp_path / "a.png"))
    if number == errno.EACCES:
        assert scan.check_image(sample) == scan.Unreadable("a.png", "permission denied")
    else:
        with pytest.raises(Kept, match=r"a\.png .*the same command continues"):
            scan.check_image(sample)


@pytest.mark.parametrize("patience", ["0", "-3", "nan", "inf"])
def test_a_patience_that_is_none_is_refused(patience: str, tmp_path: Path) -> None:
    for arguments in ((tmp_path, "--verify"), (tmp_path, tmp_path / "set", "--format", "dali")):
        result = run(*arguments, "--patience", patience)
        assert (result.returncode, "--patience is" in result.stderr) == (2, True)


def test_ctrl_c_waits_until_the_work_is_handed_out() -> None:
    """And comes then: within, it could leave a lock of the pool's behind."""
    done = []

    def hand_out() -> None:
        with signals_later():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            done.append("handed out")

    with pytest.raises(KeyboardInterrupt):
        hand_out()
    assert done == ["handed out"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with signals_later():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

"""One process writes to a run's folder, and what killed processes left goes with the next start."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_resume import write_config

from lit_peft.cli import main
from lit_peft.training.run_folder import lock_run, new_run, unlock_runs
from lit_peft.util import locks
from lit_peft.util.disk import clear_dead, clear_folder, temporary_folder, whole_folder, write_file
from lit_peft.util.errors import LitPeftError
from lit_peft.util.locks import FolderInUseError, lock_folder, process_mark

HOLD = "import sys, time; from pathlib import Path; from lit_peft.util.locks import lock_folder; "


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python with that code, and wait for its first line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


def holder(folder: Path) -> subprocess.Popen[str]:
    return start(HOLD + "lock_folder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)", folder)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_has_the_lock(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(FolderInUseError, match=f"^process {process.pid} on host {socket.gethostname()}$"):
        lock_folder(tmp_path)
    end(process)
    # It ended without giving the lock back.
    lock = lock_folder(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_process_may_lock_a_folder_twice(tmp_path: Path) -> None:
    first, second = lock_folder(tmp_path), lock_folder(tmp_path)
    first.release()
    assert (tmp_path / ".lock").exists()
    second.release()
    second.release()
    assert not (tmp_path / ".lock").exists()
    lock_folder(tmp_path).release()


def test_a_workers_life_does_not_prolong_the_lock(tmp_path: Path) -> None:
    """Workers of a data loader live on for seconds after `kill -9` of their owner."""
    code = "import os; lock_folder(Path(sys.argv[1]))\nif not os.fork(): print(os.getpid(), flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", HOLD + code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        lock_folder(tmp_path).release()
        os.kill(child, 0)  # it was there
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


@pytest.mark.parametrize("owner", ["dead", "alive", "elsewhere"])
def test_where_there_are_no_locks_a_file_is_one(owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    process = start("import time; print('here', flush=True); time.sleep(60)")
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    here = process_mark().partition("-")[0]
    mark = f"{here if owner != 'elsewhere' else '0' * 8}-{process.pid}-{started}"
    known = {"process": process.pid, "host": "other", "mark": mark}
    (tmp_path / ".lock").write_text(json.dumps(known))
    if owner == "dead":
        end(process)
    with pytest.warns(UserWarning, match="has no locks"):
        if owner == "dead":
            lock = lock_folder(tmp_path)
            assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
            lock.release()
            assert not list(tmp_path.iterdir())
        else:
            with pytest.raises(FolderInUseError, match=f"process {process.pid} on host other"):
                lock_folder(tmp_path)
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]
            end(process)


def test_runs_that_start_at_once_get_their_own_folders(tmp_path: Path) -> None:
    (tmp_path / "version_4").mkdir()
    (tmp_path / "version_4" / "config.yaml").touch()
    # Another run has created its folder, and written nothing yet.
    process = holder(tmp_path / "version_5")
    assert new_run(tmp_path) == 6
    unlock_runs()
    end(process)
    # A folder in which nothing was written is taken by the next run. What killed runs had begun to write goes.
    (tmp_path / "version_6").rmdir()
    (tmp_path / "version_4" / "checkpoints").mkdir()
    code = "import sys, time; from pathlib import Path; from lit_peft.util.disk import temporary_folder; "
    code += "[temporary_folder(Path(each)) for each in sys.argv[1:]]; print('made', flush=True); time.sleep(60)"
    parts = ("4/checkpoints/last.ckpt", "4/adapter", "5/hparams.yaml")
    process = start(code, *(tmp_path / f"version_{part}" for part in parts))
    left = list(tmp_path.rglob(".*.tmp-*"))
    assert len(left) == 3
    clear_dead(tmp_path.glob("version_*"))
    assert all(file.exists() for file in left)  # the process still runs
    end(process)
    assert new_run(tmp_path) == 5 and not any(file.exists() for file in left)
    unlock_runs()


def test_two_processes_cannot_resume_one_run(
    decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, decoder, reviews, 1, callbacks=None)
    command = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "runs")]
    assert main(command) == 0
    run = tmp_path / "runs" / "version_0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    process = holder(run)
    capsys.readouterr()
    assert main([*command, "--ckpt_path", "last"]) == 2
    said = capsys.readouterr()
    assert f"process {process.pid} on host {socket.gethostname()}" in said.err and "results:" not in said.out
    (run / ".lock").unlink()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == {**before}
    end(process)
    # A new run does not mind, and one that is free again is resumed.
    assert main([*command, "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    assert not [path for path in run.rglob(".*")]


# ------------------------------------------------------------------------------------------- what was left


def test_what_a_dead_process_left_goes_at_once_and_what_a_live_one_makes_stays(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    code = (
        "import sys, time; from pathlib import Path; from lit_peft.util.disk import temporary_folder; "
        "folder = temporary_folder(Path(sys.argv[1])); (folder / 'model').write_bytes(b'0' * 9999); "
        "print(folder, flush=True); time.sleep(60)"
    )
    dead, live = start(code, target), start(code, target)
    end(dead)
    made = {path.name for path in tmp_path.iterdir()}
    assert len(made) == 2
    elsewhere = tmp_path / ".merged.tmp-00000000-7-7-abc"
    elsewhere.mkdir()
    with whole_folder(target) as folder:
        (folder / "model").touch()
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {folder.name, elsewhere.name, next(n for n in made if f"-{live.pid}-" in n)}
    os.utime(elsewhere, (1, 1))
    end(live)
    temporary_folder(target).rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_number_that_was_given_to_a_new_process_is_not_the_old_one() -> None:
    machine, process, started = process_mark().split("-")
    assert locks.is_running(process_mark()) is True and locks.is_running(process_mark() + "-abc") is True
    assert locks.is_running(f"{machine}-{process}-{int(started) - 1}") is False
    assert locks.is_running("0a") is None and locks.is_running(f"00000000-{process}-{started}") is None


def test_the_next_start_of_a_run_clears_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    write_file(run / "checkpoints" / "last.ckpt", b"whole")
    (run / "checkpoints" / ".last.ckpt.tmp-00000000-7-7-abc").write_bytes(b"half")
    (run / ".adapter.tmp-xyz").mkdir()
    (run / ".adapter.tmp-xyz" / "file").touch()
    (run / ".adapter.old").mkdir()
    (run / ".adapter.old" / "file").touch()
    lock_run(run)
    # The old adapter was moved away, and no new one put in its place.
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) == [
        ".lock",
        "adapter/file",
        "checkpoints/last.ckpt",
    ]
    unlock_runs()
    process = holder(run)
    with pytest.raises(LitPeftError, match=f"process {process.pid}"):
        lock_run(run)
    end(process)
    clear_folder(run)


@pytest.mark.heavy
def test_killed_merges_and_exports_leave_nothing_behind(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, decoder, reviews, 1, callbacks=None)
    runs = tmp_path / "runs"
    assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(runs)]) == 0
    [checkpoint] = runs.glob("version_0/checkpoints/last.ckpt")
    code = (
        "import os, signal, sys; import lit_peft.util.disk as disk\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv.pop(1) == 'kill': disk.put_in_place = die\n"
        "from lit_peft.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (
        ["merge", "--base", decoder, "--adapter", runs / "version_0" / "adapter", "--output", tmp_path / "merged"],
        ["export", "--ckpt_path", checkpoint, "--output", tmp_path / "exported"],
    ):
        for kill in ("kill", "kill", "not"):
            began = time.time()
            command = [sys.executable, "-c", code, kill, *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == (-signal.SIGKILL if kill == "kill" else 0), done.stderr
            left = [path for path in tmp_path.glob(".*.tmp-*") if path.stat().st_mtime < began - 1]
            assert not left and len(list(tmp_path.glob(".*.tmp-*"))) == (kill == "kill")
        assert any(Path(str(arguments[-1])).iterdir())

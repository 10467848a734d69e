"""What is released, built offline from the checkout and used outside of it."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import lit_peft

ROOT = Path(__file__).parents[1]
PACKAGES = {"lit_peft": "lit_peft", "callbacks": "lit_peft/callbacks"}  # folder of the checkout: its place in the wheel
BUILT = ("build", "dist", "lit_peft_runs", "lightning_logs")
HIDDEN = (".ci", ".github", ".gitignore", ".pre-commit-config.yaml")


def sources() -> set[str]:
    """The checkout's files, by git where it is there."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-c", "safe.directory=*", "ls-files"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return {name for name in listed if (ROOT / name).is_file()}
    names = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return {
        name.as_posix()
        for name in names
        if name.parts[0] not in BUILT and not name.parts[0].endswith(".egg-info") and "cache__" not in name.as_posix()
        if not name.parts[0].startswith(".") or name.parts[0] in HIDDEN
    }


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The sdist, the folder that it unpacks to, and the wheel built from there, as `python -m build` does."""
    if int(metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("the build backend is not here: setuptools>=77")
    folder = tmp_path_factory.mktemp("release")
    for name in sources():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "checkout" / name)
    build = "from setuptools.build_meta import build_{0}; build_{0}({1!r})"
    run([sys.executable, "-c", build.format("sdist", str(folder))], folder / "checkout")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run([sys.executable, "-c", build.format("wheel", str(folder))], unpacked)
    (wheel,) = folder.glob("*.whl")
    return sdist, unpacked, wheel


def test_the_source_release_is_the_checkout(release: tuple[Path, Path, Path]) -> None:
    with tarfile.open(release[0]) as archive:
        names = [name.name for name in archive.getmembers() if name.isfile()]
    names = [name.partition("/")[2] for name in names]
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("lit_peft.egg-info/")}
    assert set(names) - made == sources() - made


def test_the_wheel_is_the_packages(release: tuple[Path, Path, Path]) -> None:
    with zipfile.ZipFile(release[2]) as archive:
        names = archive.namelist()
        (record,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(archive.read(record))
    expected = {
        place + name.removeprefix(folder)
        for folder, place in PACKAGES.items()
        for name in sources()
        if name.startswith(folder + "/")
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "lit_peft/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert about["Version"] == lit_peft.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert f"## {about['Version']} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.heavy
def test_the_installed_wheel_works_outside_of_the_checkout(
    release: tuple[Path, Path, Path], encoder: Path, reviews: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pip", reason="installs the wheel with pip")
    place = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index"]
    run([*pip, "--target", str(place), str(release[2])], tmp_path)
    command = place / "bin" / "lit-peft"
    assert "usage: lit-peft" in run([str(command), "--help"], tmp_path, PYTHONPATH=str(place))
    config = {
        "model": {"class_path": "LoRA", "init_args": {"base": str(encoder), "task": "sequence_classification"}},
        "data": {"class_path": "TextClassificationData", "init_args": {"train": str(reviews), "test_fraction": 0.2}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "callbacks": [{"class_path": "lit_peft.callbacks.FrozenWeightsGuard"}],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # One process for the commands: to import everything takes longer than they do.
    session = """
import sys
from pathlib import Path
from lit_peft.cli import main

place = sys.argv[1]
assert main(["doctor"]) == 0
assert main(["fit", "--config", "config.yaml"]) == 0
run = Path("lit_peft_runs/version_0")
(checkpoint,) = (run / "checkpoints").glob("best*.ckpt")
assert main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]) == 0
ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "lit_peft"}
strangers = [name for name, module in ours.items() if not module.__file__.startswith(place)]
assert not strangers, strangers
assert "lit_peft.callbacks.frozen_weights_guard" in ours
"""
    out = run([sys.executable, "-c", session, str(place)], tmp_path, PYTHONPATH=str(place))
    assert f"lit-peft      {lit_peft.__version__}" in out
    assert "test_accuracy" in out
    assert (tmp_path / "lit_peft_runs" / "version_0" / "adapter" / "adapter_model.safetensors").is_file()


def test_constraints_are_a_version_of_all_that_is_asked_for() -> None:
    """torch asks for a newer setuptools than was once pinned: each pin is held against whoever asks for the package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    needed, optional = declared()
    names = {requirement.name.lower() for requirement in (*needed, *optional)}
    assert names <= set(pinned), names - set(pinned)
    asked = [("lit-peft", requirement) for requirement in (*needed, *optional)] + [
        (asker, requirement)
        for asker in pinned
        if installed(asker) == pinned[asker]
        for requirement in map(Requirement, metadata.requires(asker) or ())
        if not requirement.marker or requirement.marker.evaluate({"extra": ""})
    ]
    for asker, requirement in asked:
        pin = pinned.get(requirement.name.lower().replace("_", "-"))
        assert pin is None or requirement.specifier.contains(pin, prereleases=True), (asker, str(requirement), pin)


def test_the_lowest_constraints_are_the_lowest_that_is_declared() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    needed, optional = declared()
    lowest = {
        requirement.name: specifier.version
        for requirement in (*optional, *needed)
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    assert {requirement.name for requirement in needed} - {"torch"} <= set(pinned)
    for name, version in pinned.items():
        assert Version(version) == Version(lowest[name]), (name, version, lowest[name])


def declared() -> tuple[list[Requirement], list[Requirement]]:
    """What `pyproject.toml` asks for, and what its extras do."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
    return list(map(Requirement, project["dependencies"])), [extra for extra in extras if extra.name != "lit-peft"]


def installed(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None

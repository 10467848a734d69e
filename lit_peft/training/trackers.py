"""Trackers of runs by a short name: TensorBoard, Weights & Biases, MLflow and Trackio, beside the run's own log."""

from __future__ import annotations

import json
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lit_peft.util.disk import write_file
from lit_peft.util.errors import LitPeftError, closest, first_line

# Where a run keeps the ids that trackers gave it, so that a resumed run goes on in them.
IDS = "trackers.json"
PROJECT = "lit_peft"
# The package of each tracker. The run's own log is always written, as csv.
TRACKERS = {"csv": None, "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


class TrackioLogger(Logger):
    """Logs to Trackio (https://github.com/gradio-app/trackio), whose dashboard `trackio show` opens.

    Args:
        name: name of the run; a run of that name is continued.
        project: name of the project.
        space_id: a space of the Hugging Face hub that shows the dashboard; None: this machine.
    """

    def __init__(self, name: str, project: str = PROJECT, space_id: str | None = None) -> None:
        super().__init__()
        self._name, self._project, self._space_id = name, project, space_id
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str:
        """The run."""
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, which starts when it is first asked for."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self._project, self._name, space_id=self._space_id, config=self._config, resume="allow", embed=False
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the settings for the start of the run."""
        values = vars(params) if isinstance(params, Namespace) else params
        self._config.update({name: _plain(value) for name, value in values.items()})

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers at a step."""
        self.experiment.log(dict(metrics), step)

    @rank_zero_only
    def finish(self) -> None:
        """End the run; without this, it ends with the process. `fit` may be followed by `test` in the same run."""
        if self._run is not None:
            import trackio

            trackio.finish()
            self._run = None


def check_trackers(names: str) -> list[str]:
    """Return the names in a list with commas.

    Raises:
        LitPeftError: a tracker is not known, or its package is not installed.
    """
    found = [name.strip().lower() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in TRACKERS:
            raise LitPeftError(f"--log {name!r} is not known: use {closest(name, TRACKERS)}.")
        package = TRACKERS[name]
        if package is not None and find_spec(package) is None:
            raise LitPeftError(f"--log {name} needs a package that is not installed: pip install {package}")
    return list(dict.fromkeys(found))


def make_trackers(names: Iterable[str], folder: Path) -> list[Logger]:
    """Return the loggers of the named trackers for the run in a folder; `csv` has none, since it is always written.

    The project is `lit_peft`, unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT says otherwise. W&B,
    MLflow and Trackio read their other environment variables, such as WANDB_MODE and MLFLOW_TRACKING_URI.

    Raises:
        LitPeftError: W&B or MLflow does not start a run.
    """
    ids, run = _ids(folder), "/".join(folder.parts[-2:])
    loggers: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            root, version = folder.parent, folder.name
            loggers.append(TensorBoardLogger(root, "", version, default_hp_metric=False, sub_dir="tensorboard"))
        elif name == "trackio":
            loggers.append(TrackioLogger(run, os.environ.get("TRACKIO_PROJECT", PROJECT)))
        elif name in _STARTERS:
            start, advice = _STARTERS[name]
            try:
                logger = start(run, folder, ids.get(name))
                _ = logger.experiment  # an account or a server may be missing: better now than after the base is loaded
            except Exception as problem:  # of many classes, some of them requests'
                raise LitPeftError(
                    f"--log {name}: the run cannot be started ({first_line(problem)}): {advice}"
                ) from problem
            loggers.append(logger)
    return loggers


def _start_wandb(run: str, folder: Path, number: str | None) -> Any:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandbLogger(run, save_dir=folder, id=number or secrets.token_hex(4), project=project, resume="allow")


def _start_mlflow(run: str, folder: Path, number: str | None) -> Any:
    import mlflow

    project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    # MLflow's own default; Lightning's is a folder, which MLflow no longer writes.
    uri = os.environ.get("MLFLOW_TRACKING_URI") or mlflow.get_tracking_uri()
    return MLFlowLogger(project, None if number else run, uri, run_id=number)


_STARTERS: dict[str, tuple[Callable[[str, Path, str | None], Any], str]] = {
    "wandb": (_start_wandb, "log in with `wandb login`, or set WANDB_MODE=offline."),
    "mlflow": (
        _start_mlflow,
        "set MLFLOW_TRACKING_URI to the address of a server that runs; a database file, MLflow's default, needs the "
        "package `mlflow` instead of `mlflow-skinny`.",
    ),
}


@rank_zero_only
def remember_trackers(loggers: Iterable[Logger], folder: Path) -> None:
    """Write the ids of a run's trackers into its folder."""
    kinds: tuple[tuple[type, str], ...] = ((WandbLogger, "wandb"), (MLFlowLogger, "mlflow"))
    ids = {name: str(logger.version) for logger in loggers for kind, name in kinds if isinstance(logger, kind)}
    if ids:
        write_file(folder / IDS, json.dumps({**_ids(folder), **ids}, indent=2).encode())


@rank_zero_only
def log_artifacts(loggers: Iterable[Any], config: Path, adapter: Path) -> None:
    """Give the trackers the configuration of a run and, if it has been written, the folder of its adapter.

    What a tracker refuses is a warning: training has ended, and the files are on disk.
    """
    for logger in loggers:
        try:
            _log_artifacts(logger, config, adapter)
        except Exception as problem:  # of many classes, some of them requests'
            rank_zero_warn(f"{type(logger).__name__} did not take the files of the run ({first_line(problem)}).")


def _log_artifacts(logger: Any, config: Path, adapter: Path) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("config", f"```yaml\n{config.read_text(encoding='utf-8')}\n```")
        logger.finalize("success")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(config))
        if adapter.is_dir():
            logger.experiment.log_artifacts(logger.run_id, str(adapter), "adapter")
    elif isinstance(logger, (WandbLogger, TrackioLogger)):
        library: Any = import_module("wandb" if isinstance(logger, WandbLogger) else "trackio")
        artifact = library.Artifact("-".join(config.parent.parts[-2:]), "adapter")
        artifact.add_file(str(config))
        if adapter.is_dir():
            artifact.add_dir(str(adapter), name="adapter")
        logger.experiment.log_artifact(artifact)
        if isinstance(logger, TrackioLogger):
            logger.finish()


def _ids(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

"""`fit`, `validate`, `test` and `predict`: LightningCLI with the modules and data modules of lit_peft."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

import lit_peft.data
import lit_peft.modules
from lit_peft.callbacks import (
    ExactResume,
    GracefulStop,
    LastCheckpoint,
    NonFiniteGuard,
    PredictionWriter,
    RunBanner,
    TokenProgressBar,
)
from lit_peft.callbacks.last_checkpoint import last_good, last_keeper, save_last
from lit_peft.commands.parser import Parser
from lit_peft.commands.setting_names import check_names
from lit_peft.data.base import LitDataModule
from lit_peft.formats.folder import write_adapter
from lit_peft.training.checkpoint_io import AtomicCheckpointIO
from lit_peft.training.module import BaseLM
from lit_peft.training.run_folder import (
    CONFIG,
    DATA,
    RunLogger,
    earlier_run,
    lock_run,
    new_run,
    newest_last,
    unlock_runs,
)
from lit_peft.training.run_record import check_checkpoint_file
from lit_peft.training.sharding import sharded_like, whole_parameters
from lit_peft.training.trackers import TRACKERS, check_trackers, log_artifacts, make_trackers, remember_trackers
from lit_peft.util.disk import replace_folder, temporary_folder, write_failure, write_file
from lit_peft.util.errors import LitPeftError
from lit_peft.util.quiet import quiet_run

RUNS = "lit_peft_runs"
LOG_HELP = f"where to log besides the run's folder, with commas between them: {', '.join(TRACKERS)} (not of predict)"
# Epochs of a run whose length is not set; Lightning would train 1,000.
DEFAULT_EPOCHS = 3


class SaveConfig(SaveConfigCallback):
    """Writes the run's `config.yaml` atomically: a run to resume is found by this file."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._folder = Path(str(trainer.log_dir))  # a collective call: every process must make it
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            # Its logger may have a folder that only now is known.
            lock_run(self._folder)
        text = self.parser.dump(self.config, skip_unset=False)
        write_file(self._folder / CONFIG, text.encode())

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write what the run is trained on beside its configuration, once a checkpoint to resume has been accepted."""
        if trainer.is_global_zero:
            write_file(self._folder / DATA, json.dumps(pl_module.run["data"], indent=2).encode())
            remember_trackers(trainer.loggers, self._folder)


class CLI(LightningCLI):
    """A LightningCLI that checks its input before it writes anything, and reports where the results are."""

    length_note = ""
    arguments: Sequence[str] = ()

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("test", "predict"):
            parser.add_argument("--output", type=str | None, default=None, help="file of the predictions (JSON lines)")
        # In each of them: they read the config.yaml of the run.
        parser.add_argument("--log", type=str | None, default=None, help=LOG_HELP)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.arguments = sys.argv[1:] if args is None else list(map(str, args))
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as problem:
            raise LitPeftError(f"A configuration file is not UTF-8 ({problem}): save it as UTF-8.") from None
        except ValueError as problem:
            if "null byte" not in str(problem):  # raised when jsonargparse looks for a file of that name
                raise
            raise LitPeftError(
                "A setting contains the character \\0, which no file name may have: remove it."
            ) from None

    def _parse_ckpt_path(self) -> None:
        # The configuration determines what is built; the tensors of the checkpoint are checked against it later.
        return None

    def before_instantiate_classes(self) -> None:
        """Refuse unknown settings, and fill in those that depend on others: the tokenizer and the number of epochs."""
        config = self.config[self.subcommand]
        if not hasattr(config.trainer, "max_steps"):
            raise LitPeftError(f"trainer: {config.trainer!r} in a configuration: give the settings of the Trainer.")
        check_names(self.arguments, config)
        if self.subcommand == "fit" and _never_ends(config.trainer):
            config.trainer.max_epochs = DEFAULT_EPOCHS
            self.length_note = "the default: set --trainer.max_epochs or --trainer.max_steps"
        data = config.get("data")
        if data is not None and "base" in data.get("init_args", {}) and data.init_args.base is None:
            data.init_args.base = config.model.init_args.get("base")
            if data.init_args.get("tokenizer") is None and data.init_args.get("revision", "not a setting") is None:
                data.init_args.revision = config.model.init_args.get("revision")
        if data is not None and data.get("init_args", {}).get("add_tokens", "not a setting") is None:
            data.init_args.add_tokens = config.model.init_args.get("add_tokens")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check model and data, then build the trainer with progress bar, banner and checkpoints."""
        config = self.config_init[self.subcommand]
        root = Path(config.trainer.default_root_dir or RUNS)
        given = config.trainer.callbacks or []
        trackers = check_trackers(config.get("log") or "")
        self._check_checkpoint()
        version = self._resumed_version(root, given)
        if self.datamodule is not None:
            self.datamodule.setup(str(self.subcommand))
        self.model.check_data(self.datamodule)
        self.model.take_labels(self.datamodule)
        self.model.check()
        extra: list[Any] = [RunBanner(self.length_note)]
        if config.trainer.enable_progress_bar is not False:
            # In a log file, a bar that is updated at every step is mostly noise.
            extra.append(TokenProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50))
        if self.subcommand in ("test", "predict"):
            extra.append(PredictionWriter(config.output))
        if self.subcommand != "fit":
            # The checkpoint has the states of callbacks that act in training only.
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
        if self.subcommand == "fit":
            for callback_class in (GracefulStop, ExactResume, NonFiniteGuard):
                if not any(isinstance(callback, callback_class) for callback in given):
                    extra.append(callback_class())
        keepers = []
        if config.trainer.enable_checkpointing is not False and not config.trainer.fast_dev_run:
            keepers = self._checkpoints(given)
        check_checkpoint_file(self.model, self.datamodule, config.get("ckpt_path"), str(self.subcommand))
        _check_writable(root)
        logger = config.trainer.logger
        if logger is None or logger is True:
            if version is None and self.subcommand == "fit" and not config.trainer.fast_dev_run:
                version = new_run(root)
            own = RunLogger(root, name=None, version=version)
            # Prediction has no metrics, and the others of its settings come from the run's config.yaml.
            is_logged = self.subcommand != "predict" and not config.trainer.fast_dev_run
            kwargs["logger"] = [own, *make_trackers(trackers if is_logged else [], Path(own.log_dir))]
        elif trackers:
            raise LitPeftError(f"--log {config.log} and trainer.logger are both set: leave one of them out.")
        plugins = config.trainer.plugins or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        given = [callback for callback in given if callback not in keepers]
        return super().instantiate_trainer(callbacks=[*given, *extra, *keepers], plugins=plugins, **kwargs)

    def _resumed_version(self, root: Path, callbacks: list[Any]) -> int | None:
        """For `--ckpt_path last`, find the newest last checkpoint of this run, and return the number of the run."""
        config = self.config_init[self.subcommand]
        if self.subcommand != "fit" or config.get("ckpt_path") != "last":
            return None
        plain = yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_unset=False))
        version = earlier_run(root, plain)
        folders = [Path(c.dirpath) for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        if version is not None:
            lock_run(root / f"version_{version}")  # before anything of that run is read
            folders.append(root / f"version_{version}" / "checkpoints")
        found = newest_last(folders)
        if found is None:
            rank_zero_only(print)(
                f"No run of this model, data and seed in {root} has a last checkpoint: training starts anew."
            )
        if found is not None or config.trainer.logger in (None, True):
            config.ckpt_path = None if found is None else str(found)
        return version

    def _check_checkpoint(self) -> None:
        """Refuse a checkpoint that does not exist, and warn if an untrained model is about to be tested."""
        path = self.config_init[self.subcommand].get("ckpt_path")
        named = path is not None and path not in ("last", "best", "hpc") and "://" not in path
        if named and not path.startswith("registry") and not Path(path).exists():
            raise LitPeftError(f"ckpt_path={path!r} does not exist: give the checkpoint that `lit-peft fit` wrote.")
        adapter = self.model.hparams.adapter
        if path is None and adapter is not None and not Path(adapter).is_dir():
            raise LitPeftError(f"model.adapter={adapter!r} does not exist: give the folder of an adapter.")
        if path is None and adapter is None and self.subcommand != "fit":
            rank_zero_warn(f"ckpt_path is not set, so {self.subcommand} uses an untrained adapter.")

    def _checkpoints(self, given: list[Any]) -> list[Any]:
        """Return the best checkpoint's callback, unless one is given, and the last checkpoint's, given or not."""
        last = [callback for callback in given if isinstance(callback, LastCheckpoint)] or [LastCheckpoint()]
        if any(isinstance(callback, ModelCheckpoint) and callback not in last for callback in given):
            return last
        validates = "validation" in getattr(self.datamodule, "rows", {})
        monitor, mode = self.model.task.monitor if validates else (None, "min")
        # A resumed run that comes again to a step that it had saved replaces its own file.
        best = ModelCheckpoint(monitor=monitor, mode=mode, filename="best-{step}", enable_version_counter=False)
        return [best, *last]

    def after_fit(self) -> None:
        """Report what there is now, and fail if training did. Every process must call this."""
        self._report()
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        guards = (callback for callback in callbacks if isinstance(callback, NonFiniteGuard))
        problem = next((guard.problem for guard in guards if guard.problem), None)
        if problem:
            raise LitPeftError(f"{problem} The last good checkpoint is {last_good(self.trainer)}.")

    def _report(self) -> None:
        """Print the metrics, write the best adapter, and suggest the next command."""
        trainer = self.trainer
        say = print if trainer.is_global_zero else (lambda *_: None)
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        best = trainer.strategy.broadcast(checkpoint.best_model_path if checkpoint else "")
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        say()
        if trainer.interrupted:
            say("Training was interrupted; the last checkpoint is available.")
        for name, value in sorted(trainer.callback_metrics.items()):
            say(f"{name:<17} {value.item():.4f}")
        if best and checkpoint and checkpoint.monitor and checkpoint.best_model_score is not None:
            say(f"{'best ' + checkpoint.monitor:<18}{checkpoint.best_model_score.item():.4f}  ({best})")
        keeper = last_keeper(trainer)
        if not best and keeper is not None and keeper.save_last:
            # Training ended before the first validation, so there is no best checkpoint.
            best = str(save_last(trainer, keeper))
            say(f"No validation was reached, so the weights of the last step are used ({best}).")
        if not best:
            return
        # People share the best adapter, not the last one.
        adapter = folder / "adapter"
        try:
            self._write_best(best, adapter)
        except LitPeftError as problem:
            say(f"{'weights':<18}in the checkpoint only ({problem})")
        else:
            size = sum(file.stat().st_size for file in adapter.iterdir()) if adapter.is_dir() else 0
            say(f"{'adapter':<18}{adapter}  ({size / 2**20:.2f} MB)")
        log_artifacts(trainer.loggers, folder / CONFIG, adapter)
        config = shlex.quote(str(folder / "config.yaml"))
        say(f"\nnext:  lit-peft test --config {config} --ckpt_path {shlex.quote(best)}")

    def _write_best(self, best: str, adapter: Path) -> None:
        """Write the adapter of a checkpoint of this run, replacing an earlier one.

        Raises:
            LitPeftError: no format supports the method, or the strategy splits the model in a way of its own.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
            raise LitPeftError(
                f"{type(strategy).__name__} splits the model; to write the adapter, run `lit-peft export --ckpt_path "
                f"{best} --output {adapter}`"
            )
        weights: dict[str, torch.Tensor] = {}
        if self.trainer.is_global_zero:
            weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        weights = strategy.broadcast(weights)
        parameters = dict(self.model.named_parameters())
        sharded = {name: sharded_like(parameters.get(name), value) for name, value in weights.items()}
        self.model.load_state_dict(sharded)
        problem = None
        with whole_parameters(self.model):
            if self.trainer.is_global_zero:
                temporary = temporary_folder(adapter)
                try:
                    write_adapter(self.model.model, temporary)
                    # A run that was killed here and resumed has one already.
                    replace_folder(temporary, adapter)
                except LitPeftError as error:
                    shutil.rmtree(temporary, ignore_errors=True)
                    problem = str(error)
        problem = strategy.broadcast(problem)
        if problem:
            raise LitPeftError(problem)


def run(arguments: list[str], cli_class: type[CLI] = CLI) -> CLI:
    """Run `fit`, `validate`, `test` or `predict`.

    Args:
        arguments: the command and its options.
        cli_class: what runs it.

    Returns:
        The object that ran it.

    Raises:
        LitPeftError: the input is wrong.
    """
    quiet_run()
    for package in (lit_peft.data, lit_peft.modules):
        for name in package.__all__:
            getattr(package, name)  # jsonargparse finds subclasses that have been imported
    # A printed configuration with comments is worth keeping.
    arguments = ["--print_config=comments" if text == "--print_config" else text for text in arguments]
    sys.argv = [sys.argv[0], *arguments]
    try:
        return _run(cli_class)
    finally:
        unlock_runs()


def _run(cli_class: type[CLI]) -> CLI:
    return cli_class(
        BaseLM,
        LitDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        trainer_defaults={"enable_model_summary": False},
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def _never_ends(trainer: Any) -> bool:
    """Return whether the trainer's settings do not say how long to train."""
    unset = trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None
    return bool(unset and not trainer.fast_dev_run)


def _check_writable(root: Path) -> None:
    """Check that the folder of the runs is writable before anything is computed."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise LitPeftError(f"{write_failure('Runs', root, error)} Give another --trainer.default_root_dir.") from error

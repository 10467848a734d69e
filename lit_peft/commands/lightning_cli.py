"""`fit`, `validate`, `test` and `predict`: LightningCLI over the modules and data modules of lit_peft."""

from __future__ import annotations

import inspect
import logging
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

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
from lit_peft.callbacks import ExactResume, GracefulStop, PredictionWriter, RunBanner, TokenProgressBar
from lit_peft.callbacks.graceful_stop import save_last
from lit_peft.commands.setting_names import check_names
from lit_peft.data.base import LitDataModule
from lit_peft.formats.folder import write_adapter
from lit_peft.training.checkpoint_io import AtomicCheckpointIO
from lit_peft.training.module import BaseLM
from lit_peft.training.run_folder import CONFIG, RunLogger, earlier_run, newest_last
from lit_peft.training.sharding import sharded_like, whole_parameters
from lit_peft.util.disk import replace_folder, temporary_folder, write_failure, write_file
from lit_peft.util.errors import LitPeftError, closest

RUNS = "lit_peft_runs"
# Epochs of a run whose length is not set; Lightning would train 1,000.
DEFAULT_EPOCHS = 3


class Parser(LightningArgumentParser):
    """Raises `LitPeftError` with one paragraph where jsonargparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise LitPeftError(_readable(message)) from ex


class SaveConfig(SaveConfigCallback):
    """Writes the run's `config.yaml` whole or not at all: a resumed run is found by it."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._folder = Path(str(trainer.log_dir))  # asks all processes
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        text = self.parser.dump(self.config, skip_unset=False)
        write_file(self._folder / CONFIG, text.encode())


class CLI(LightningCLI):
    """LightningCLI that checks everything before it writes anything, and says where the results are."""

    length_note = ""
    arguments: Sequence[str] = ()

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("test", "predict"):
            parser.add_argument("--output", type=str | None, default=None, help="file of the predictions (JSON lines)")
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.arguments = sys.argv[1:] if args is None else list(map(str, args))
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as problem:
            raise LitPeftError(f"A file of settings is not UTF-8 ({problem}): save it as UTF-8.") from None
        except ValueError as problem:
            if "null byte" not in str(problem):  # what jsonargparse meets where it looks for a file of that name
                raise
            raise LitPeftError("A setting holds the character \\0, which no file and no name has: drop it.") from None

    def _parse_ckpt_path(self) -> None:
        # The configuration says what to build, and the checkpoint's tensors are checked against it.
        return None

    def before_instantiate_classes(self) -> None:
        """Refuse unknown settings, and fill in those that depend on others: the tokenizer and the number of epochs."""
        config = self.config[self.subcommand]
        check_names(self.arguments, config)
        if self.subcommand == "fit" and _never_ends(config.trainer):
            config.trainer.max_epochs = DEFAULT_EPOCHS
            self.length_note = "the default: set --trainer.max_epochs or --trainer.max_steps"
        data = config.get("data")
        if data is not None and "base" in data.get("init_args", {}) and data.init_args.base is None:
            data.init_args.base = config.model.init_args.get("base")
            if data.init_args.get("tokenizer") is None and data.init_args.get("revision", "not a setting") is None:
                data.init_args.revision = config.model.init_args.get("revision")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check model and data, then build the trainer with what every run has: bar, banner, checkpoints."""
        self._check_checkpoint()
        if self.datamodule is not None:
            self.datamodule.setup(str(self.subcommand))
        self.model.check_data(self.datamodule)
        self.model.take_labels(self.datamodule)
        self.model.check()
        config = self.config_init[self.subcommand]
        given = config.trainer.callbacks or []
        extra: list[Any] = [RunBanner(self.length_note)]
        if config.trainer.enable_progress_bar is not False:
            # Where nobody watches it live, a bar that moves every step only fills the log.
            extra.append(TokenProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50))
        if self.subcommand in ("test", "predict"):
            extra.append(PredictionWriter(config.output))
        if self.subcommand == "fit":
            kinds = (GracefulStop, ExactResume)
            extra += [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in given)]
        saves = config.trainer.enable_checkpointing is not False and not config.trainer.fast_dev_run
        if saves and not any(isinstance(callback, ModelCheckpoint) for callback in given):
            extra.append(self._checkpoint())
        root = Path(config.trainer.default_root_dir or RUNS)
        _check_writable(root)
        version = self._resumed_version(root, [*given, *extra])
        logger = config.trainer.logger
        if logger is None or logger is True:
            kwargs["logger"] = RunLogger(root, name=None, version=version)
        plugins = config.trainer.plugins or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(callbacks=[*given, *extra], plugins=plugins, **kwargs)

    def _resumed_version(self, root: Path, callbacks: list[Any]) -> int | None:
        """With `--ckpt_path last`, name the newest last checkpoint of this run, and return the run's number."""
        config = self.config_init[self.subcommand]
        if self.subcommand != "fit" or config.get("ckpt_path") != "last":
            return None
        plain = yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_unset=False))
        version = earlier_run(root, plain)
        folders = [Path(c.dirpath) for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        if version is not None:
            folders.append(root / f"version_{version}" / "checkpoints")
        found = newest_last(folders)
        if found is None:
            rank_zero_only(print)(
                f"No run of this model and data in {root} has a last checkpoint: this is a first start."
            )
        if found is not None or config.trainer.logger in (None, True):
            config.ckpt_path = None if found is None else str(found)
        return version

    def _check_checkpoint(self) -> None:
        """Refuse a checkpoint that is not there, and say where testing without one is testing what is not trained."""
        path = self.config_init[self.subcommand].get("ckpt_path")
        named = path is not None and path not in ("last", "best", "hpc") and "://" not in path
        if named and not path.startswith("registry") and not Path(path).exists():
            raise LitPeftError(f"ckpt_path={path!r} does not exist: give the checkpoint that `lit-peft fit` wrote.")
        if path is None and self.subcommand != "fit":
            rank_zero_warn(f"No ckpt_path is given, so {self.subcommand} runs on the method as it starts, untrained.")

    def _checkpoint(self) -> ModelCheckpoint:
        validates = "validation" in getattr(self.datamodule, "rows", {})
        monitor, mode = self.model.task.monitor if validates else (None, "min")
        return ModelCheckpoint(monitor=monitor, mode=mode, filename="best-{step}", save_last=True)

    def after_fit(self) -> None:
        """Say how it went, write the best adapter, and say what to do next. Every process takes part."""
        trainer = self.trainer
        say = print if trainer.is_global_zero else (lambda *_: None)
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        best = trainer.strategy.broadcast(checkpoint.best_model_path if checkpoint else "")
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        say()
        if trainer.interrupted:
            say("Training was interrupted; the last checkpoint is kept.")
        for name, value in sorted(trainer.callback_metrics.items()):
            say(f"{name:<17} {value.item():.4f}")
        if best and checkpoint and checkpoint.monitor and checkpoint.best_model_score is not None:
            say(f"{'best ' + checkpoint.monitor:<18}{checkpoint.best_model_score.item():.4f}  ({best})")
        if not best and checkpoint is not None and checkpoint.dirpath and checkpoint.save_last:
            # Training ended before the first validation that could have told the best.
            best = str(save_last(trainer, checkpoint))
            say(f"No validation was reached, so what is kept is the last step's weights ({best}).")
        if not best:
            return
        # The adapter people share is the best one, not the last.
        adapter = folder / "adapter"
        try:
            self._write_best(best, adapter)
        except LitPeftError as problem:
            say(f"{'weights':<18}in the checkpoint only ({problem})")
        else:
            size = sum(file.stat().st_size for file in adapter.iterdir()) if adapter.is_dir() else 0
            say(f"{'adapter':<18}{adapter}  ({size / 2**20:.2f} MB)")
        config = shlex.quote(str(folder / "config.yaml"))
        say(f"\nnext:  lit-peft test --config {config} --ckpt_path {shlex.quote(best)}")

    def _write_best(self, best: str, adapter: Path) -> None:
        """Write the adapter of a checkpoint of this run; one that is there is replaced.

        Raises:
            LitPeftError: no format has the method, or the strategy has the model in pieces of its own.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
            raise LitPeftError(
                f"{type(strategy).__name__} holds the model in pieces: `lit-peft export --ckpt_path {best} --output "
                f"{adapter}` writes the adapter"
            )
        weights: dict[str, torch.Tensor] = {}
        if self.trainer.is_global_zero:
            weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        weights = strategy.broadcast(weights)
        places = dict(self.model.named_parameters())
        self.model.load_state_dict({name: sharded_like(places.get(name), value) for name, value in weights.items()})
        problem = None
        with whole_parameters(self.model):
            if self.trainer.is_global_zero:
                temporary = temporary_folder(adapter)
                try:
                    write_adapter(self.model.model, temporary)
                    # A run that was killed here, and resumed, has one already.
                    replace_folder(temporary, adapter)
                except LitPeftError as error:
                    shutil.rmtree(temporary, ignore_errors=True)
                    problem = str(error)
        problem = strategy.broadcast(problem)
        if problem:
            raise LitPeftError(problem)


def run(arguments: list[str]) -> None:
    """Run one of Lightning's commands.

    Args:
        arguments: the command and its options.

    Raises:
        LitPeftError: bad input.
    """
    _quiet()
    for package in (lit_peft.data, lit_peft.modules):
        for name in package.__all__:
            getattr(package, name)  # jsonargparse finds subclasses that have been imported
    # Comments are what makes a printed configuration worth keeping.
    arguments = ["--print_config=comments" if text == "--print_config" else text for text in arguments]
    sys.argv = [sys.argv[0], *arguments]
    CLI(
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
    """Say before anything is computed that the folder of the runs cannot be written to."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise LitPeftError(f"{write_failure('Runs', root, error)} Give another --trainer.default_root_dir.") from error


def _quiet() -> None:
    """Leave out what the libraries say about themselves; what they warn of stays."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", message=".*The dirpath has changed.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")


# What jsonargparse says of the ways it tried, which tells a user nothing.
_NOISE = re.compile(r"Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|.*Does not validate against")


def _readable(message: str) -> str:
    """Bring what jsonargparse reports to one paragraph that names the closest settings or classes."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = " ".join(line for line in lines if line and not _NOISE.match(line))
    kinds = [*_subclasses(BaseLM), *_subclasses(LitDataModule)]
    missing = re.search(r"arguments are required: (.+)", text)
    if missing:
        options = ", ".join("--" + name.rpartition(".")[2] for name in missing[1].split(", "))
        return (
            f"{options} must be given, on the command line or by a --config file, e.g. "
            "`lit-peft fit --config configs/quickstart.yaml`."
        )
    optimization = re.search(r"(?:unrecognized arguments: --|does not accept option ')(optimizer|lr_scheduler)\b", text)
    if optimization:
        return (
            f"{optimization[1]!r} is a setting of the model here: give --model.optimizer AdamW with "
            "--model.learning_rate and --model.optimizer_args, and --model.lr_scheduler linear, cosine or constant "
            "with --model.warmup_steps."
        )
    text = re.sub(r'Parser key "[^"]+": (?=Parser key )', "", text)
    unknown = re.search(r"Option '([^']+)' is not accepted", text)
    if unknown:
        names = [name for kind in kinds for name in inspect.signature(kind).parameters]
        near = closest(unknown[1], names)
        return f"{unknown[1]!r} is not a setting of the class it is given to: the closest are {near}."
    unknown = re.search(r"Expected a dot import path string: (\S+)", text)
    if unknown:
        return (
            f"{unknown[1]!r} is not a known class: the closest are {closest(unknown[1], [k.__name__ for k in kinds])}."
        )
    unknown = re.search(r"does not accept option '([^'.]+)", text)
    if unknown:
        keys = ("model", "data", "trainer", "seed_everything", "ckpt_path")
        return f"{unknown[1]!r} is not a key of the configuration: the closest are {closest(unknown[1], keys)}."
    return text or message


def _subclasses(kind: type[Any]) -> list[type[Any]]:
    children: list[type[Any]] = kind.__subclasses__()
    return [found for child in children for found in (child, *_subclasses(child))]

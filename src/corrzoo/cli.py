"""LightningCLI for all heads, backbones and datasets: `corrzoo fit | validate | test | predict`."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from corrzoo import recipes
from corrzoo.callbacks.checkpoints import Checkpoints, WholeFiles
from corrzoo.callbacks.config import SaveConfig
from corrzoo.callbacks.folder import name_run
from corrzoo.callbacks.signals import Stopped
from corrzoo.data.module import PairsDataModule
from corrzoo.errors import ZooError, one_line
from corrzoo.heads import HEADS
from corrzoo.matcher import Matcher
from corrzoo.parser import Modules, ZooParser, message_of
from corrzoo.store.checkpoints import init_from, newest_checkpoint, read_checkpoint

RUNS = "runs"
"""Folder of all runs, unless `--trainer.default_root_dir` is given."""
TRAINING = frozenset(
    "weights low_weights finetune lr backbone_lr optimizer weight_decay schedule warmup_steps milestones gamma".split()
)
"""Options that do not matter to evaluation."""


class ZooCLI(LightningCLI):
    """LightningCLI with the zoo's defaults. A checkpoint that contradicts the command line is an error."""

    def __init__(self, args: list[str]) -> None:
        quieten()
        super().__init__(
            Matcher,
            PairsDataModule,
            subclass_mode_model=True,
            seed_everything_default=0,
            parser_class=ZooParser,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            load_from_checkpoint_support=False,  # checkpoints hold plain options; `corrzoo.load` reads them
            trainer_defaults={
                "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "", "name": ""}},  # see `name_run`
                "enable_model_summary": False,  # `before_fit` prints one line instead
            },
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser without abbreviations: `--trainer.max_epoch` is a typo, not `max_epochs`."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--plugins` before all other options, so that it also comes first in a saved configuration."""
        text = "modules that register heads, backbones or datasets, separated by commas; must come before their options"
        parser.add_argument("--plugins", type=Modules(), help=text)
        super().add_default_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--init_from`, and `--checkpoint.*`, by default the best checkpoint by validation PCK, and the last."""
        text = "fit begins with the weights of this checkpoint, folder or hf:// model, unless --ckpt_path resumes a run"
        parser.add_argument("--init_from", type=str | None, help=text)
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        best = {"monitor": "val/pck@0.1", "mode": "max", "filename": "best", "enable_version_counter": False}
        parser.set_defaults({f"checkpoint.{name}": value for name, value in best.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with defaults, and once more without, to know the options that the user gave."""
        words = recipes.resolve(args)  # type: ignore[arg-type]  # __init__ takes a list
        self.config = parser.parse_args(words)
        command = self.config.subcommand
        self.given = parser.parse_args(words, defaults=False)[command].as_dict().get("model", {}).get("init_args", {})
        # Lightning would replace the model by the checkpoint's
        self.checkpoint = self.config[command].pop("ckpt_path")

    def before_instantiate_classes(self) -> None:
        """Find and check the checkpoint, and name the run's folder."""
        config = self.config[self.config.subcommand]
        if self.config.subcommand == "fit" and config.trainer.default_root_dir and SLURMEnvironment.detect():
            self._resume_slurm_job(config)
        if self.checkpoint in ("best", "last"):
            root = config.checkpoint.dirpath or getattr(config.trainer.logger, "init_args", {}).get("save_dir")
            folder = Path(root or config.trainer.default_root_dir or RUNS)
            name, backbone = f"{self.checkpoint}.ckpt", self.given.get("backbone")
            self.checkpoint = newest_checkpoint(folder, name, recipes.class_name(config.model.class_path), backbone)
        config.ckpt_path = self.checkpoint and str(self.checkpoint)
        remote = "://" in str(self.checkpoint) and not str(self.checkpoint).startswith("hf://")
        if self.checkpoint and self.checkpoint != "hpc" and not remote:
            self._check_checkpoint(config, Path(self.checkpoint))
        self.save_config_kwargs = {"saved": config.clone()}
        name_run(config, self.config.subcommand, Path(RUNS))

    def _resume_slurm_job(self, config: Namespace) -> None:
        """Keep checkpoints in the SLURM job's own folder, and resume a restarted job from the newest one."""
        job = Path(config.trainer.default_root_dir)
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(job / "checkpoints")
        found = [*Path(config.checkpoint.dirpath).glob("last.ckpt"), *job.glob("hpc_ckpt_*.ckpt")]
        if found and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            self.checkpoint = max(found, key=lambda path: path.stat().st_mtime)

    def _check_checkpoint(self, config: Namespace, path: Path) -> None:
        """Take the model's options from the checkpoint. Contradicting the command line is an error."""
        head, saved, epochs, steps = read_checkpoint(path)
        if (wanted := recipes.class_name(config.model.class_path)) != head:
            raise ZooError(f"checkpoint {path} is a {head} model, not {wanted}: give --model {head}")
        given, free, fits = self.given, HEADS[head].evaluation_options, self.config.subcommand == "fit"
        ignored = free if fits else free | TRAINING
        differing = [k for k in given if k in saved and k not in ignored and not _same(given[k], saved[k])]
        if differing:
            listed = ", ".join(f"{k}={saved[k]!r} (not {given[k]!r})" for k in differing)
            raise ZooError(f"checkpoint {path} was trained with {listed}: leave these options out, or train again")
        for name, value in saved.items():
            if name in config.model.init_args and not (name in free and name in given):
                config.model.init_args[name] = value
        for limit, done in {"max_epochs": epochs, "max_steps": steps}.items():
            if fits and 0 < (config.trainer[limit] or 0) <= done:
                print(f"{path} has already reached {limit}={config.trainer[limit]}: give a larger --trainer.{limit}")
                sys.exit(0)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer. Checkpoints are written atomically, unless its strategy has its own format."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:  # Lightning does not know the strategy
            raise ZooError(one_line(error)) from error
        plain = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if plain and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        return trainer

    def before_fit(self) -> None:
        """Copy the weights of `--init_from`, and print the model and its number of parameters."""
        if self.config.fit.init_from and not self.checkpoint:
            init_from(self.model, self.config.fit.init_from)
        total = sum(self.model.count_parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        rank_zero_info(f"{self.model.title}: {total:,} parameters, {trained:,} of them trained")

    def before_test(self) -> None:
        """Turn Lightning's table off: `ResultsWriter` prints one."""
        self.config_init["test"]["verbose"] = False


def quieten() -> None:
    """Silence two messages of Lightning that a user cannot act on."""
    # an advertisement for a logger, at every start
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    # Lightning uses a deprecated function of PyTorch in every loader
    warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", module=r"lightning\.pytorch\.utilities\._pytree")


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _same(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, list | tuple) and isinstance(b, list | tuple) else a == b


def main(args: list[str] | None = None) -> None:
    """Run a command of LightningCLI; `args` is the command line, `sys.argv` if None."""
    try:
        ZooCLI(sys.argv[1:] if args is None else args)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(128 + stopped.number)
    except Exception as error:
        sys.exit(f"error: {message_of(error)}")

"""LightningCLI for the zoo: `lightning fit | validate | test | predict`, for any head, backbone and dataset."""

import os
import re
import sys
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from corrzoo import commands
from corrzoo.callbacks.resume import Checkpoints, Stopped, WholeFiles
from corrzoo.data.module import PairsDataModule
from corrzoo.heads import HEADS, list_heads
from corrzoo.matcher import Matcher
from corrzoo.registry import import_plugins, nearest
from corrzoo.store.checkpoints import read_checkpoint
from corrzoo.types import ZooError


class Modules:
    """The type of `--plugins`. What is said twice, as in a YAML and on the command line, adds up."""

    def __init__(self) -> None:
        self.named: dict[str, None] = {}

    def __call__(self, names: str | list[str]) -> str:
        self.named |= dict.fromkeys(import_plugins(names))
        return ", ".join(self.named)

    def __repr__(self) -> str:  # which --help shows
        return "modules"


class ZooParser(LightningArgumentParser):
    """A parser whose errors are one line, which names what was meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with status 2. argparse hides what the zoo's own error says behind one of its own."""
        sys.stderr.write(f"error: {_zoo_error(ex) or explain(message, self)}\n")
        sys.exit(2)


class ZooCLI(LightningCLI):
    """LightningCLI with the zoo's defaults, and a guard: a checkpoint does not silently replace the model asked for.

    Args:
        args: The command line; that of the process when not given.
    """

    training_options: ClassVar[frozenset[str]] = frozenset(
        "weights low_weights finetune lr backbone_lr optimizer weight_decay schedule milestones gamma".split()
    )
    """Options that mean nothing once a model is only evaluated."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            Matcher,
            PairsDataModule,
            subclass_mode_model=True,
            seed_everything_default=0,
            parser_class=ZooParser,
            parser_kwargs={
                "description": "Train and compare matching heads for semantic correspondence.",
                "epilog": commands.listing(),
            },
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},  # with --trainer.logger false all runs share a folder
            load_from_checkpoint_support=False,  # checkpoints hold plain options; `corrzoo.load` reads them
            trainer_defaults={"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": ""}}},
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """No abbreviations: `--trainer.max_epoch` is a typo, not `max_epochs`."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--plugins` before all others, so that saved configurations name modules above what these register."""
        told = "modules that register heads, backbones or datasets, with commas between them; to be said first"
        parser.add_argument("--plugins", type=Modules(), help=told)
        super().add_default_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The checkpoint callback, whose options are `--checkpoint.*`: the best by validation PCK, and the last."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/pck@0.1",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Keep, beside the whole configuration, what was asked for in so many words."""
        super().parse_arguments(parser, args)
        said = parser.parse_args(args, defaults=False)  # type: ignore[arg-type]  # a command line, not a dict
        self.asked = said[self.config.subcommand]

    def _parse_ckpt_path(self) -> None:
        # Lightning's own version replaces the model that was asked for by the checkpoint's, without a word. Here the
        # checkpoint's options hold where nothing else was asked for, and a contradiction is an error.
        config = self.config[self.config.subcommand]
        if self.config.subcommand == "fit" and config.trainer.default_root_dir and SLURMEnvironment.detect():
            _go_on_with_the_job(config)
        if config.get("ckpt_path") in ("best", "last"):
            config.ckpt_path = str(_newest(f"{config.ckpt_path}.ckpt", config))
        path = config.get("ckpt_path")
        if not path or str(path) == "hpc" or ("://" in str(path) and not str(path).startswith("hf://")):
            return
        head, saved = read_checkpoint(Path(path))
        if (asked := config.model.class_path.rsplit(".", 1)[-1]) != head:
            raise ZooError(f"{path} holds a {head}, but the command asks for a {asked}: give --model {head}")
        said = self.asked.as_dict().get("model", {}).get("init_args", {})
        free = HEADS[head].evaluation_options
        ignored = self.training_options if self.config.subcommand != "fit" else frozenset()
        differing = [k for k in said if k in saved and k not in free | ignored and not _same(said[k], saved[k])]
        if differing:
            listed = ", ".join(f"{k}={saved[k]!r} (the command says {said[k]!r})" for k in differing)
            raise ZooError(f"{path} was trained with {listed}: leave these options out, or train anew")
        for name, value in saved.items():
            if name in config.model.init_args and not (name in free and name in said):
                config.model.init_args[name] = value

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer whose checkpoints are whole or not there, unless it has a way of its own to write them."""
        trainer = super().instantiate_trainer(**kwargs)
        plain = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if plain and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        return trainer

    def before_test(self) -> None:
        """The result writer prints its own table; Lightning's would repeat every number for every dataset."""
        self.config_init["test"]["verbose"] = False

    def before_instantiate_classes(self) -> None:
        """Name the run's folder after its model, and keep wandb offline where nobody is logged in."""
        config = self.config[self.config.subcommand]
        logger, model = config.trainer.logger, config.model
        self._refuse_what_cannot_be(config)
        if hasattr(logger, "class_path"):
            head = model.class_path.rsplit(".", 1)[-1]
            if "name" in logger.init_args and logger.init_args.name == "":
                logger.init_args.name = f"{head}-{model.init_args.backbone.replace('/', '-')}"
            if logger.class_path.endswith("WandbLogger") and not _logged_in_to_wandb():
                logger.init_args.offline = True
                print("wandb: no account on this machine, the run is kept offline (`wandb sync` sends it later)")

    def _refuse_what_cannot_be(self, config: Any) -> None:
        """Before anything is built: Lightning finds these late, in many lines, or not at all."""
        command, monitor, strategy = self.config.subcommand, config.checkpoint.monitor or "", config.trainer.strategy
        scores = [f"val/pck@{alpha:g}" for alpha in config.model.init_args.alphas]
        if command == "fit" and monitor.startswith("val/pck@") and monitor not in scores:
            raise ZooError(f"no {monitor} is scored to keep the best by: give --checkpoint.monitor one of {scores}")
        if isinstance(strategy, str) and strategy not in (known := ["auto", *StrategyRegistry]):
            raise ZooError(f"unknown strategy {strategy!r}{nearest(strategy, known) or ': auto or ddp, for instance'}")
        stage = {"test": "test", "validate": "val", "predict": "predict"}.get(command)
        if stage and config.trainer[f"limit_{stage}_batches"] == 0:
            raise ZooError(f"--trainer.limit_{stage}_batches 0 leaves nothing to evaluate: give a larger one, or none")


def explain(message: str, parser: LightningArgumentParser) -> str:
    """What a parser's error comes down to, in one line, with the nearest valid name."""
    options = {a.dest for a in parser._actions} | {f"model.{o}" for h in list_heads() for o in HEADS.options(h)}
    if found := re.search(r"Option '(\S+?)' is not accepted", message):
        name = found[1]
        names = {o.rsplit(".", 1)[-1]: o for o in options}
        hint = nearest(name, names) or "; --help lists the options"
        return f"unknown option {name!r}{hint}"
    if found := re.search(r"unrecognized arguments: --(\S+)", message):
        name = found[1].split("=")[0]
        return f"unknown option '--{name}'{nearest(name, options) or '; --help lists the options'}"
    if found := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", message):
        choices = [*re.findall(r"\w+", found[2]), *commands.COMMANDS]
        return f"unknown command {found[1]!r}{nearest(found[1], choices) or ': choose from ' + ', '.join(choices)}"
    if re.search(r"key \"(?:\w+\.)?model\".*Given value: (?!.*'class_path')\{", message, re.DOTALL):
        return "options of a head come before the head: put --config zoo_configs/<head>.yaml (or --model <head>) first"
    if found := re.search(
        r"key \"(?:\w+\.)?model\".*Given value: (?:.*'class_path': '([^']+)'|(\S+))", message, re.DOTALL
    ):
        name = found[1] or found[2]
        known = f": choose one of {', '.join(list_heads())}, or say --plugins <module of your own> first"
        return f"unknown head {name!r}{nearest(name, list_heads()) or known}"
    if "arguments are required" in message and "model" in message:
        return "no head was given: add --config zoo_configs/<head>.yaml, or --model <head>; heads: " + ", ".join(
            list_heads()
        )
    return " ".join(message.split())


def _go_on_with_the_job(config: Any) -> None:
    """Keep the checkpoints of a SLURM job in its own folder, and start from the newest when it is started again."""
    job = Path(config.trainer.default_root_dir)
    config.checkpoint.dirpath = config.checkpoint.dirpath or str(job / "checkpoints")
    left = [*Path(config.checkpoint.dirpath).glob("last.ckpt"), *job.glob("hpc_ckpt_*.ckpt")]
    if left and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        config.ckpt_path = str(max(left, key=lambda path: path.stat().st_mtime))


def _newest(name: str, config: Any) -> Path:
    """The newest checkpoint of that name: Lightning looks into the folder of this run alone, which is empty yet."""
    options = getattr(config.trainer.logger, "init_args", {})
    folder = Path(config.checkpoint.dirpath or options.get("save_dir") or config.trainer.default_root_dir or ".")
    found = sorted(folder.rglob(name), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ZooError(f"there is no {name} under {folder} to go on from: give --ckpt_path a file, or leave it out")
    return found[-1]


def _same(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, list | tuple) and isinstance(b, list | tuple) else a == b


def _logged_in_to_wandb() -> bool:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return (
        "WANDB_API_KEY" in os.environ
        or "WANDB_MODE" in os.environ
        or (netrc.is_file() and "wandb.ai" in netrc.read_text())
    )


def main(args: ArgsType = None) -> None:
    """What `__main__.main` runs when it is none of its own commands."""
    try:
        ZooCLI(args)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(128 + stopped.number)
    except Exception as error:
        sys.exit(f"error: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    """What a user can do something about; what is a fault of the code is raised again, with its traceback."""
    if cause := _zoo_error(error):
        # A reading process wraps its error into a page of traceback; the last line is the error.
        return str(cause).rsplit("ZooError: ", 1)[-1].strip()
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    if isinstance(error, OSError):  # a read-only folder, a full disk
        return f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    if "DataLoader worker" in str(error):
        return (
            f"{str(error).splitlines()[0]} Mostly that is memory: give fewer --data.num_workers, and go on with "
            "--ckpt_path last"
        )
    raise error


def _zoo_error(error: BaseException | None) -> ZooError | None:
    """The zoo's own error in a chain of causes: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, ZooError):
        error = error.__cause__ or error.__context__
    return error

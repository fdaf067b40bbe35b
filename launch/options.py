"""The options of a training run, checked before anything is started."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from distsign.exchange import EXCHANGES
from distsign.vote import require_margin
from launch.hooks import CARRIES, HOOKS, OWNER_CARRIES, SIGN_VOTE, make_rival, make_vote_state
from launch.schemes import CONFIDENCES, OPTIMIZERS, make_confidence
from launch.specs import example_of
from launch.tasks import TASKS

RESUME_IF_THERE = "if-there"
RESUME_PREVIOUS = "previous"
_DATA_HELP = (
    "folder with the task's files: Fashion-MNIST's four (or MNIST's, or 'digits'), or CIFAR's binary version (or "
    "'synthetic'); by default found by itself"
)
_SCHEDULE_HELP = "of the learning rate; steps: a tenth of it after 1/2, a hundredth after 5/6 of the run"
WIRES = ("auto", "planes", "sparse")
_VOTE_DEFAULTS = (
    ("margin", 1),
    ("l2", 0.0),
    ("wire", "auto"),
    ("exchange", "two_phase"),
    ("carry", "auto"),
    ("owner_carry", "auto"),
    ("bits_per_param", None),
    ("checksum", False),
    ("max_density", None),
    ("max_poison_streak", None),
)


class UsageError(ValueError):
    """An option that cannot be; the message says which, what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What one run does; the names are those of the command line."""

    task: str
    width: int
    data: str | None
    optimizer: str
    lr: float
    momentum: float | None
    weight_decay: float
    schedule: str
    hook: str
    confidence: str | None
    margin: int
    l2: float
    wire: str
    exchange: str
    carry: str
    owner_carry: str
    bits_per_param: float | None
    checksum: bool
    max_density: float | None
    max_poison_streak: int | None
    bucket_cap_mb: float
    batch_size: int
    steps: int | None
    epochs: float | None
    seed: int
    device: str
    eval_every: int | None
    checkpoint: str | None
    checkpoint_every: int | None
    stop_after: int | None
    check_replicas: int
    timeout: float
    resume: str | None
    metrics: str | None

    # What may differ between a run and the one that resumes it; all else decides the numbers.
    _OF_NO_CONSEQUENCE = frozenset(
        {
            "data",
            "device",
            "checkpoint",
            "checkpoint_every",
            "stop_after",
            "check_replicas",
            "timeout",
            "resume",
            "metrics",
        }
    )

    def trajectory(self) -> dict[str, Any]:
        """Return the options that decide the numbers: a run can only go on with the same."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in self._OF_NO_CONSEQUENCE}

    def check(self) -> None:
        """Refuse options that are out of range or do not go together.

        Raises:
            UsageError: names the option and what to do.
        """
        self._check_ranges()
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs say the same thing twice: give one of them")
        optimizer = OPTIMIZERS[self.optimizer]
        if self.momentum is not None and optimizer.momentum is None:
            raise UsageError(f"--momentum is no option of --optimizer {self.optimizer}: leave it out")
        if self.weight_decay and not optimizer.decays:
            raise UsageError(f"--weight-decay is no option of --optimizer {self.optimizer}: leave it out")
        try:
            optimizer.require_package()
        except ValueError as error:
            raise UsageError(f"--optimizer {self.optimizer} {error}") from error
        if self.confidence is not None:
            try:
                make_confidence(self.confidence)
            except ValueError as error:
                raise UsageError(f"--confidence {self.confidence}: {error}") from error
        if self.hook == SIGN_VOTE:
            self._check_vote()
        else:
            self._check_without_vote()
        if self.data is not None and TASKS[self.task].dataset is None:
            raise UsageError(f"--data names a folder of images, task {self.task} does not use it: leave it out")
        if self.checkpoint is None:
            for name in ("resume", "checkpoint_every", "stop_after"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{_flag(name)} needs --checkpoint FILE")

    def check_ranks(self, world_size: int) -> None:
        """Refuse options that so many ranks cannot have.

        Raises:
            UsageError: names the option and what to do.
        """
        if self.hook == SIGN_VOTE:
            try:
                require_margin(self.margin, world_size)
            except ValueError as error:
                raise UsageError(as_typed(error)) from error

    def check_folders(self) -> None:
        """Refuse results in a folder that is not there and should not be made: only the last one of a path is.

        Raises:
            UsageError: names the option and what to do.
        """
        for name in ("metrics", "checkpoint"):
            value = getattr(self, name)
            folder = Path(value or "file").resolve().parent
            # A mistyped path is far more likely than somebody who wants a new folder beside /usr.
            if not folder.is_dir() and (folder.parent == Path(folder.anchor) or not folder.parent.is_dir()):
                raise UsageError(f"{_flag(name)} {value}: there is no folder {folder}: make it, or name another")

    def _check_ranges(self) -> None:
        for name, low, high in (("lr", 0.0, float("inf")), ("momentum", 0.0, 1.0), ("bucket_cap_mb", 0.0, 1e6)):
            value = getattr(self, name)
            if value is not None and not (low <= value < high and (name == "momentum" or value > 0)):
                bracket = "[" if name == "momentum" else "("
                raise UsageError(f"{_flag(name)} must be in {bracket}{low:g}, {high:g}), got {value:g}")
        for name in ("weight_decay", "l2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{_flag(name)} must be 0 or more, got {getattr(self, name):g}")
        for name in ("width", "batch_size", "margin", "steps", "eval_every", "checkpoint_every", "stop_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_flag(name)} must be 1 or more, got {value}")
        if not 0 < self.timeout < 1e6:
            raise UsageError(f"--timeout must be above 0, in seconds, got {self.timeout:g}")
        if self.check_replicas < 0:
            raise UsageError(f"--check-replicas must be 0 (never) or more, got {self.check_replicas}")
        if self.epochs is not None and not 0 < self.epochs < 1e6:
            raise UsageError(f"--epochs must be above 0, got {self.epochs:g}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be in [0, 2**63), got {self.seed}")

    def _check_vote(self) -> None:
        if self.confidence is None:
            raise UsageError(f"--hook sign-vote needs --confidence: one of {', '.join(CONFIDENCES)}")
        if self.weight_decay and OPTIMIZERS[self.optimizer].l2:
            raise UsageError(
                f"--weight-decay of {self.optimizer} is L2, which would turn each abstention into a vote for decay: "
                "use --l2, or an optimizer with decoupled decay (adamw, sign-adam-pp)"
            )
        try:
            make_vote_state(self)  # what the library would refuse after the start, it refuses now
        except ValueError as error:
            raise UsageError(as_typed(error)) from error

    def _check_without_vote(self) -> None:
        try:
            gives = make_rival(self.hook).gives
        except ValueError as error:
            raise UsageError(f"--hook {self.hook}: {error}") from error
        if gives == "direction" and (self.optimizer != "sgd" or self.momentum):
            raise UsageError(
                f"--hook {self.hook} keeps the moments itself and gives the direction of the step: it needs "
                f"--optimizer sgd without --momentum, got {self.optimizer}"
                + (f" --momentum {self.momentum:g}" if self.momentum else "")
            )
        sees_raw_gradients = OPTIMIZERS[self.optimizer].own and self.confidence is not None
        if sees_raw_gradients and self.l2 and self.weight_decay:
            raise UsageError("--l2 and --weight-decay are two ways to decay the same weights: give one of them")
        for name, default in _VOTE_DEFAULTS:
            if getattr(self, name) != default and not (name == "l2" and sees_raw_gradients):
                hint = " (without a vote, L2 is the optimizer's --weight-decay)" if name == "l2" else ""
                raise UsageError(f"{_flag(name)} is an option of --hook sign-vote, got --hook {self.hook}{hint}")
        if self.confidence is not None and not OPTIMIZERS[self.optimizer].own:
            own = ", ".join(name for name, entry in OPTIMIZERS.items() if entry.own)
            raise UsageError(
                f"--confidence needs --hook sign-vote, or an optimizer that takes it ({own}); "
                f"got --hook {self.hook} --optimizer {self.optimizer}"
            )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _OneLineParser(argparse.ArgumentParser):
    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once, not once a rank
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line of `launch.train`."""
    parser = _OneLineParser(
        prog="launch.train",
        description="Train one task, alone or on several ranks started by torchrun.",
        epilog="--check alone trains nothing: it reads command lines as JSON, and says which can run (launch.check).",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--task", choices=TASKS, default="fashion-mnist-lenet", help="data and model")
    what.add_argument("--width", type=int, default=1, help="multiplies the model's channels and hidden units")
    what.add_argument("--data", help=_DATA_HELP)
    what.add_argument("--batch-size", type=int, default=32, help="samples per rank and step")
    what.add_argument("--steps", type=int, help="how long; by default --epochs 4")
    what.add_argument("--epochs", type=float, help="how long, in passes over the training data")
    what.add_argument("--seed", type=int, default=0, help="of weights, order of samples and whatever is drawn")
    what.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU per rank, or CPU")

    how = parser.add_argument_group("optimizer")
    how.add_argument("--optimizer", choices=OPTIMIZERS, default="sign-adam-pp", help="by name")
    how.add_argument("--lr", type=float, default=1e-3, help="learning rate at the first step, see --schedule")
    how.add_argument("--momentum", type=float, help="by default the optimizer's own")
    how.add_argument("--weight-decay", type=float, default=0.0, help=f"decoupled, but L2 for {_with_l2()}")
    how.add_argument("--schedule", choices=("cosine", "constant", "steps"), default="cosine", help=_SCHEDULE_HELP)

    link = parser.add_argument_group("what goes over the link")
    link.add_argument(
        "--hook", metavar="NAME[:KEY=VALUE,...]", default="none", help=f"how gradients are combined: {', '.join(HOOKS)}"
    )
    link.add_argument("--confidence", metavar="NAME[:KEY=VALUE,...]", help=f"who may vote: {_confidence_help()}")
    link.add_argument("--margin", type=int, default=1, help="least lead of a verdict, in votes")
    link.add_argument("--l2", type=float, default=0.0, help="added to each gradient before the confidence")
    link.add_argument("--wire", choices=WIRES, default="auto", help="codec of the ballots")
    link.add_argument("--exchange", choices=EXCHANGES, default="two_phase", help="how ballots and verdicts travel")
    link.add_argument("--carry", choices=CARRIES, default="auto", help="what a rank keeps of ballots it did not cast")
    link.add_argument("--owner-carry", choices=OWNER_CARRIES, default="auto", help="what owners keep of votes")
    link.add_argument("--bits-per-param", type=float, metavar="BITS", help="budget per parameter and direction")
    link.add_argument("--checksum", action="store_true", help="4 bytes more a payload, to find what a link damaged")
    link.add_argument("--max-density", type=float, metavar="SHARE", help="leave out ballots that are denser than this")
    link.add_argument("--max-poison-streak", type=int, metavar="STEPS", help="leave out a rank that poisons so many")
    link.add_argument("--bucket-cap-mb", type=float, default=25.0, help="DDP's bucket size, in MiB")

    out = parser.add_argument_group("results")
    out.add_argument("--metrics", metavar="FILE", help="append JSON lines to this file (rank 0)")
    out.add_argument("--eval-every", type=int, metavar="STEPS", help="test and write a line; by default every epoch")
    out.add_argument(
        "--checkpoint", metavar="FILE", help="keep the state of the run here (rank 0), the one before in FILE.previous"
    )
    out.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="by default at the end only")
    out.add_argument(
        "--stop-after", type=int, metavar="STEPS", help="end this process early, after so many steps and a checkpoint"
    )
    out.add_argument(
        "--check-replicas",
        type=int,
        default=100,
        metavar="STEPS",
        help="compare parameters and optimizer state between the ranks so often, and before a checkpoint; 0: never",
    )
    out.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="end with an error where another rank does not answer for so long",
    )
    out.add_argument(
        "--resume",
        nargs="?",
        const="must",
        choices=("must", RESUME_IF_THERE, RESUME_PREVIOUS),
        help="go on from --checkpoint, which must be there and whole; 'previous': from FILE.previous, the one before; "
        "'if-there': from the first of both that is whole, or start a new run where there is none",
    )
    return parser


def parse_options(argv: list[str] | None = None) -> TrainOptions:
    """Parse and check a command line.

    Raises:
        UsageError: one clear line for the user.
    """
    options = TrainOptions(**vars(make_parser().parse_args(argv)))
    options.check()
    return options


def exit_with(message: str, code: int = 2, prog: str = "launch.train") -> NoReturn:
    """End this rank because of the user's mistake: rank 0 says it in one line, all ranks end with the same code.

    torchrun ends all ranks as soon as one has failed. So that no silent rank fails first, the others wait to be ended;
    and so that they get here, and end with this code and not by a signal, rank 0 waits a moment too.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            time.sleep(2)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(10)
    sys.stdout.flush()
    os._exit(code)


def as_typed(error: ValueError) -> str:
    """Return the library's words about an option, which they begin with, as the user knows it: `--margin must be`."""
    name, rest = re.fullmatch(r"(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    return _flag(name) + rest if name in known else str(error)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_l2() -> str:
    return ", ".join(name for name, entry in OPTIMIZERS.items() if entry.l2)


def _confidence_help() -> str:
    return ", ".join(example_of(name, make) for name, make in CONFIDENCES.items()).replace("%", "%%")

"""Train one task, alone or on several ranks: `torchrun --nproc-per-node 4 launch/train.py --hook sign-vote ...`.

The steps of a run:

1. Check the options, before anything is started; an error is one line and exit code 2, on every rank alike.
2. On each machine the first rank sees to the data, then all join the process group.
3. Build the model from the seed, wrap it in DDP, register the hook, make the optimizer, load the checkpoint.
4. Train; test every so often, and write a line of metrics each time.

A run that is resumed repeats an unbroken one bit for bit under `--hook sign-vote`. With an all-reduce it does so on one
or two ranks; on more, float sums depend on DDP's bucket layout, which starts anew with every process.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

if __package__ in (None, ""):
    # Started as a file: this folder's modules must not pass for top-level ones, and `launch` itself must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from distsign import ReplicaCheck, ReplicaError, VoteError
from distsign.kernels import kernels_for
from distsign.wire import PayloadError
from launch import check, checkpoint
from launch.data import DataError
from launch.hooks import Combiner, SignVote, Traffic, bucket_cap_mb, register_hook
from launch.metrics import MetricsFile, describe_machine
from launch.options import TrainOptions, UsageError, as_typed, exit_with, parse_options
from launch.run_state import Progress, RunState
from launch.runtime import RankLostError, Ranks, agree, choose_device, start, watch
from launch.schemes import make_optimizer
from launch.tasks import TASKS, Shard, Task

DEFAULT_EPOCHS = 4.0
NUM_UNTIMED_STEPS = 5
"""The first steps of a process: DDP rebuilds its buckets, caches are cold."""
NUM_SILENT_STEPS = 50
"""After so many steps without a ballot it is said that nothing is learned; thresholds may start high."""
COMPILED_WITHIN_S = 2.0
"""Loading kernels that are compiled already takes less."""
TRAFFIC_OF = "mean over the ranks, from the first step on"


class Trainer:
    """One run on one rank.

    Args:
        options: what to do.
        ranks: this process's place; the process group is there already.
        device: where to compute.

    Raises:
        UsageError: the options do not suit the task or the number of ranks, or the ranks have different data.
    """

    def __init__(self, options: TrainOptions, ranks: Ranks, device: torch.device) -> None:
        self.options, self.ranks, self.device = options, ranks, device
        self.task: Task = TASKS[options.task].make(options.data, options.width)
        agree("the data", self.task.source, ranks, "give every machine the same files, or --data")
        self.shard = Shard(ranks.rank, ranks.world_size, options.batch_size, options.seed)
        self.steps_per_epoch = self.task.steps_per_epoch(self.shard)
        self.num_steps = self._num_steps()
        torch.manual_seed(options.seed)
        self.net: nn.Module = self.task.build_model().to(device)
        self.model = DistributedDataParallel(
            self.net,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=bucket_cap_mb(options, device),
        )
        try:
            self.combiner: Combiner = register_hook(self.model, options)
            vote_state = self.combiner.state if isinstance(self.combiner, SignVote) else None
            self.optimizer: Optimizer = make_optimizer(self.model, options, vote_state)
        except ValueError as error:
            raise UsageError(as_typed(error)) from error
        self.replicas: ReplicaCheck | None = None
        if options.check_replicas:
            self.replicas = ReplicaCheck(self.net, self.optimizer, every=options.check_replicas)
        self._has_warned = False
        self._doing = "starting"
        self.progress = Progress(0, torch.zeros((), dtype=torch.float64, device=device))
        self._state = RunState(
            net=self.net,
            optimizer=self.optimizer,
            combiner=self.combiner,
            progress=self.progress,
            ranks=ranks,
            device=device,
        )

    def run(self) -> None:
        """Train to the last step, and write what was measured.

        Raises:
            RankLostError: another rank has ended or hangs, or a link to it; within `--timeout`.
        """
        with watch(self.ranks, lambda: f"{self._doing}, after step {self.progress.step}"):
            self._run()

    def _run(self) -> None:
        self._compile_kernels()
        self._resume()
        metrics = MetricsFile(self.options.metrics if self.ranks.is_first else None, self.progress.step)
        metrics.write(self._first_line())
        last_step = min(self.num_steps, self.progress.step + (self.options.stop_after or self.num_steps))
        measured = self._train_until(last_step, metrics)
        if last_step < self.num_steps:
            self._say(f"stopped after step {last_step} of {self.num_steps}: go on with --resume")
            return
        measured = measured or self._measure()
        metrics.write({"event": "end", **measured, "ranks": [asdict(traffic) for traffic in self._traffic_of_ranks()]})
        self._say(f"{self.task.metric} {measured[self.task.metric]:.4f} after {self.num_steps} steps")

    def close(self) -> None:
        """Give back what the hook holds of the process group, which can then be destroyed."""
        self.combiner.close()

    def _train_until(self, last_step: int, metrics: MetricsFile) -> dict[str, Any]:
        """Train, test and save; return the last test's numbers, empty where there was none."""
        options = self.options
        eval_every = options.eval_every or max(1, min(self.steps_per_epoch, self.num_steps))
        measured: dict[str, Any] = {}
        with self._bar() as bar:
            while self.progress.step < last_step:
                self._doing = "training"
                self._train_step()
                step = self.progress.step
                bar.update()
                if step % eval_every == 0 or step == self.num_steps:
                    measured = self._measure()
                    metrics.write({"event": "test", **measured})
                    bar.set_postfix({self.task.metric: f"{measured[self.task.metric]:.4f}"})
                if options.checkpoint and (step == last_step or step % (options.checkpoint_every or last_step) == 0):
                    self._save()
        return measured

    def _compile_kernels(self) -> None:
        """Do at once what would else happen in the first step, where the bar would seem to hang."""
        if self.options.confidence is None:
            return
        words = "loading the kernels; the first time on a machine they are compiled, a minute or two"
        notice = threading.Timer(COMPILED_WITHIN_S, self._note, [words])
        notice.daemon = True
        notice.start()
        kernels_for(self.device)
        notice.cancel()

    def _warn_if_silent(self, traffic: Traffic) -> None:
        step = self.progress.step
        if traffic.ballot_density == 0 and not self._has_warned and step >= min(NUM_SILENT_STEPS, self.num_steps):
            self._has_warned = True
            self._note(
                f"warning: no component has voted in {step} steps, so nothing is learned: "
                f"lower the threshold of --confidence {self.options.confidence}"
            )

    def _note(self, text: str) -> None:
        if self.ranks.is_first:
            tqdm.write(f"launch.train: {text}", file=sys.stderr)

    def _bar(self) -> tqdm[NoReturn]:
        # A terminal gets a bar that moves, a log a line now and then.
        every_s = 0.2 if sys.stderr.isatty() else 10.0
        return tqdm(
            total=self.num_steps,
            initial=self.progress.step,
            desc=f"{self.options.optimizer}, {self.options.hook}",
            unit="step",
            mininterval=every_s,
            maxinterval=max(10.0, every_s),
            disable=not self.ranks.is_first,
        )

    def _say(self, text: str) -> None:
        if self.ranks.is_first:
            print(text, flush=True)

    def _num_steps(self) -> int:
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"--batch-size {self.shard.batch_size} on {self.shard.world_size} ranks is more than the data have: "
                "take a smaller one"
            )
        if self.options.steps is not None:
            return self.options.steps
        return max(1, round((self.options.epochs or DEFAULT_EPOCHS) * self.steps_per_epoch))

    def _train_step(self) -> None:
        progress = self.progress
        began = time.perf_counter()
        self._set_lr(progress.step)
        inputs, targets = self.task.batch(progress.step, self.shard)
        loss = self.task.loss(self.model, (inputs.to(self.device), targets.to(self.device)))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.replicas is not None:
            self.replicas.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        progress.loss_sum += loss.detach()
        progress.num_losses += 1
        progress.step += 1
        progress.step_times_s.append(time.perf_counter() - began)

    def _set_lr(self, step: int) -> None:
        factor = 1.0
        if self.options.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        elif self.options.schedule == "steps":  # epochs 150 and 250 of 300 in many papers
            factor = 0.1 ** ((2 * step >= self.num_steps) + (6 * step >= 5 * self.num_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * factor

    def _measure(self) -> dict[str, Any]:
        """Test the model on all ranks together; the same numbers on each, but for its own times."""
        progress = self.progress
        self._doing = "testing"
        self.net.eval()
        tested = self.task.evaluate(self.net, self.ranks.rank, self.ranks.world_size, self.device)
        self.net.train()
        totals = torch.cat([tested, progress.loss_sum[None], torch.full_like(tested[:1], progress.num_losses)])
        dist.all_reduce(totals)
        progress.loss_sum.zero_()
        progress.num_losses = 0
        metric_sum, metric_count, loss_sum, num_losses = totals.tolist()
        timed = progress.step_times_s[NUM_UNTIMED_STEPS:]
        traffic = Traffic.mean(self._traffic_of_ranks())
        self._warn_if_silent(traffic)
        return {
            "step": progress.step,
            "epoch": progress.step / self.steps_per_epoch,
            "train_loss": loss_sum / num_losses if num_losses else None,
            self.task.metric: metric_sum / metric_count,
            **asdict(traffic),
            "traffic_of": TRAFFIC_OF,
            "median_step_s": statistics.median(timed) if timed else None,
        }

    def _traffic_of_ranks(self) -> list[Traffic]:
        everyones: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(everyones, self.combiner.traffic(self.progress.step))
        return everyones

    def _first_line(self) -> dict[str, Any]:
        return {
            "event": "start",
            "options": asdict(self.options),
            "world_size": self.ranks.world_size,
            "num_steps": self.num_steps,
            "first_step": self.progress.step,
            "num_parameters": sum(p.numel() for p in self.net.parameters()),
            "metric": self.task.metric,
            "higher_is_better": self.task.higher_is_better,
            "data": self.task.source,
            "device": str(self.device),
            **describe_machine(),
        }

    def _trajectory(self) -> dict[str, Any]:
        return {**self.options.trajectory(), "num_steps": self.num_steps, "data_source": self.task.source}

    def _save(self) -> None:
        assert self.options.checkpoint is not None
        self._doing = "writing a checkpoint"
        if self.replicas is not None:
            self.replicas.check()  # only rank 0's parameters are kept
        shared, own = self._state.snapshot()
        checkpoint.save(self.options.checkpoint, {"options": self._trajectory(), **shared}, own, self.ranks)

    def _resume(self) -> None:
        options = self.options
        if options.resume is None:
            return
        assert options.checkpoint is not None
        found = checkpoint.load(options.checkpoint, options.resume, self._trajectory(), self.ranks)
        if found is None:
            return
        if found.warning:
            self._note(f"warning: {found.warning}")
        self._state.restore(found, options.hook)


def main(argv: list[str] | None = None, *, leave: bool = False) -> None:
    """Run the command line; does not return where the user has made a mistake.

    Args:
        argv: the arguments; None: those of the process.
        leave: end the process after the last line, without torch's teardown. There a run once hung, and once aborted
            ("terminate called without an active exception"), and a whole run counted as failed. Why is not known.
    """
    try:
        if (sys.argv[1:] if argv is None else argv) == [check.FLAG]:
            check.answer(sys.stdin, sys.stdout)
            return
        options = parse_options(argv)
        ranks = Ranks.from_environment()
        options.check_ranks(ranks.world_size)
        if ranks.rank == ranks.local_rank:  # on the machine of rank 0, which alone writes files
            options.check_folders()
        device = choose_device(options.device, ranks)
        dataset = TASKS[options.task].dataset
        if dataset is not None and ranks.local_rank == 0:
            dataset.fetch(options.data, say=lambda text: print(f"launch.train: {text}", file=sys.stderr, flush=True))
        start(ranks, device, options.timeout)
        with watch(ranks):
            trainer = Trainer(options, ranks, device)
        trainer.run()
        if leave:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        trainer.close()
        dist.destroy_process_group()
    except (UsageError, DataError) as error:
        exit_with(str(error))
    except ReplicaError as error:
        exit_with(str(error), code=1)
    except VoteError as error:
        if not isinstance(error.__cause__, PayloadError):
            raise
        exit_with(str(error), code=1)  # a rank or a link is at fault, and the words say which
    except RankLostError as error:
        # Each rank for itself: nobody knows who is left.
        print(f"launch.train: error: {error}", file=sys.stderr, flush=True)
        time.sleep(1)  # torchrun ends all as soon as one has ended; let the others speak
        os._exit(1)
    except KeyboardInterrupt:
        exit_with("interrupted", code=130)


if __name__ == "__main__":
    main(leave=True)

"""From buckets to verdicts: what happens between DDP's call of the hook and the future that it waits for.

Ballots are cast where DDP calls the hook, in the middle of backward; the exchange, and what follows it, runs on the
exchange thread (CPU) or on a side stream (CUDA), while backward goes on. State is committed at the end of a step, and
only if no rank sent poison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from distsign.exchange import Verdicts, VoteExchange
from distsign.exchange_thread import ExchangeThread
from distsign.kernels import kernels_for
from distsign.layout import IntArray
from distsign.options import VoteOptions
from distsign.plan import Column, Plan, fills_group
from distsign.planner import GroupPlanner
from distsign.registry import ParameterRegistry, VoteError
from distsign.sizes import Density
from distsign.statistics import VoteCounts
from distsign.vote_memory import VoteMemory
from distsign.voter import rotating_starts

__all__ = ["VotePipeline"]


@dataclass(frozen=True)
class _Bucket:
    """What is needed of a `GradBucket`, which must not be kept after the hook returned."""

    gradient: Tensor
    rows: tuple[int, ...]
    future: Future[Tensor]


class VotePipeline:
    """The way of one model's buckets.

    Args:
        options: what the user chose.
        registry: the model's parameters.
        counts: statistics, added to.

    Attributes:
        memory: what one step leaves to the next.
        exchange: among the ranks; None until they have met.
        started: whether they agree on the options.
        num_local_steps: backward passes of this rank.
    """

    def __init__(self, options: VoteOptions, registry: ParameterRegistry, counts: VoteCounts) -> None:
        self.options = options
        self.memory = VoteMemory(options)
        self.exchange: VoteExchange | None = None
        self.started = False
        self.num_local_steps = 0
        self._registry = registry
        self._counts = counts
        self._planner = GroupPlanner(options, registry)
        self._thread = ExchangeThread("distsign-exchange")
        self._column = 0
        self._group: list[_Bucket] = []
        self._room: tuple[int, torch.device] | None = None
        self._error: VoteError | None = None
        self._in_backward = False
        self._poisoned = torch.zeros((), dtype=torch.bool)
        self._unfit = self._poisoned  # whether this rank itself sent poison
        self._stream: torch.cuda.Stream | None = None

    def raise_if_broken(self) -> None:
        """Raise what broke the vote, in this step or an earlier one."""
        if self._error is not None:
            raise self._error

    def lr_scale(self) -> float | Tensor:
        """Return the factor on the learning rate of the last step."""
        scale = self.memory.steering.lr_scale
        return float(scale) if scale.device.type == "cpu" else scale

    def close(self) -> None:
        """End the exchange thread and give its process group back."""
        self._thread.close()
        if self.exchange is not None:
            self.exchange.close()

    # ----------------------------------------------------------------------------------------------- on DDP's thread

    def meet(self, num_voters: int, column: int) -> None:
        """Take so many voters, this rank's number in its node, and all parameters known by now into account.

        Raises:
            ValueError: see `VoteMemory.meet` and `GroupPlanner.meet`.
        """
        self.memory.meet(num_voters)
        self._planner.meet(num_voters)
        self._column = column

    def start(self, exchange: VoteExchange) -> None:
        """Begin to vote, before the first bucket; all ranks agree on the options by then.

        Args:
            exchange: with the admission that `memory` has since `meet`.
        """
        self.meet(exchange.num_voters, exchange.local_rank)
        assert exchange.admission is self.memory.admission
        self.exchange = exchange
        self.started = True

    @property
    def density(self) -> Density:
        """Share of the components that payloads have slots for in this step."""
        return self._planner.density(self.memory.ladder)

    def on_bucket(self, bucket: GradBucket, scale: Tensor) -> Future[Tensor]:
        """Take a bucket in; its future holds the verdicts.

        Args:
            bucket: what DDP hands over.
            scale: float64 scalar tensor, the loss scale.
        """
        gradient = bucket.buffer()
        device = gradient.device
        rows = tuple(self._registry.see(parameter) for parameter in bucket.parameters())
        if bucket.index() == 0:
            self._begin_step(device)
        self.grow(device)
        future: Future[Tensor] = Future() if device.type == "cpu" else Future(devices=[device])
        if self.options.l2:
            self._add_l2(bucket, scale)
        self._group.append(_Bucket(gradient, rows, future))
        waiting = sum(each.gradient.numel() for each in self._group)
        if bucket.is_last() or fills_group(waiting, self.options.bits_per_param):
            self._flush(scale, is_last=bucket.is_last())
        return future

    def _begin_step(self, device: torch.device) -> None:
        # Something is left here only after a step that broke off, and its other half is lost.
        self._thread.wait()
        self._group.clear()
        self.memory.begin_step()
        self._counts.begin_step()
        self._poisoned = self._unfit = torch.zeros((), dtype=torch.bool, device=device)
        # Outside of backward DDP calls the hook with zeros, for a rank that has joined (`Join`, uneven inputs).
        self._in_backward = torch._C._current_graph_task_id() != -1
        if self._in_backward:
            self.num_local_steps += 1
            # An error set on a Future reaches the user as "Unable to cast ... to Tensor"; raised from a callback of the
            # autograd engine it leaves backward as it is.
            torch.autograd.Variable._execution_engine.queue_callback(self._await_step)

    def _await_step(self) -> None:
        self._thread.wait()
        self.raise_if_broken()

    def grow(self, device: torch.device) -> None:
        """Make room for the parameters that DDP has shown by now; after the first step it has shown all."""
        if (len(self._registry), device) == self._room:
            return
        self._room = len(self._registry), device
        self._await_votes()  # they may just be cast, out of what is about to move
        self.memory.grow(self._planner.voted_lengths(self._column), device)

    def _await_votes(self) -> None:
        self._thread.wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _add_l2(self, bucket: GradBucket, scale: Tensor) -> None:
        for gradient, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True):
            # A parameter without a gradient of its own (unused, or a rank that has joined) must not vote for decay.
            factor = (self.options.l2 * scale * gradient.any()).to(gradient.dtype)
            gradient.add_(parameter.detach().to(gradient.dtype) * factor)

    def plan(self, buckets: tuple[tuple[int, ...], ...], device: torch.device) -> Plan:
        """Return how an exchange group of buckets, each the rows of its parameters in order, is dealt out."""
        return self._planner.plan(buckets, self.memory.voter.home, self.density, device)

    def _flush(self, scale: Tensor, *, is_last: bool) -> None:
        """Cast the ballots of the buckets that have gathered, and send them on their way."""
        assert self.exchange is not None
        device = self._group[0].gradient.device
        group, self._group = self._group, []
        plan = self.plan(tuple(bucket.rows for bucket in group), device)
        self._counts.exchanged(sum(bucket.gradient.numel() for bucket in group))
        ballots = None
        if self.options.ranks_per_node == 1:
            column = plan.columns[0]
            wide = [bucket.gradient.float() for bucket in group]
            raw = torch.cat([scale.new_zeros(0).float(), *(wide[k][a : a + n] for k, a, n in column.raw_runs)])
            ballots = self.cast(column, wide, raw, scale)
        job = partial(self._run, group, plan, ballots, scale, is_last)
        if device.type == "cpu":
            self._thread.submit(job)
        else:
            used = [scale, self._poisoned, self._unfit, self.memory.admission.seen, *(each.gradient for each in group)]
            self._run_beside(job, used if ballots is None else [*used, ballots])

    def cast(self, column: Column, grads: list[Tensor], raw: Tensor, scale: Tensor) -> Tensor:
        """Return the payloads of this rank's ballots on a column's share."""
        device = raw.device
        kernels = kernels_for(device)
        planes = torch.empty(column.layout.buffer_bytes, dtype=torch.uint8, device=device)
        cast = self.memory.voter.cast(
            grads,
            column.layout,
            column.rows,
            scale=scale,
            kernels=kernels,
            out=planes,
            step=self._counts.num_steps,
            factors=self.memory.steering.of(column.rows),
            caps=self._caps(column),
            forget=self.options.forgets,
            lengths=column.lengths,
        )
        self._counts.ballots(column.layout.num_elements, cast.num_ballots)
        poison = ~(cast.finite & raw.isfinite().all())
        self._unfit = self._unfit | poison
        crowded, caps = cast.crowded, column.ballots.caps
        if caps is None:
            crowded = None
        elif crowded is None:
            crowded = raw.new_zeros(caps.size, dtype=torch.bool)
        return column.ballots.seal(planes, crowded, raw, poison, kernels)

    def _caps(self, column: Column) -> IntArray | None:
        """Return the most ballots of each piece: owners would leave out all of an honest worker that casts more."""
        caps, density = column.ballots.caps, self.options.max_density
        if density is None:
            return caps
        most = column.layout.most_votes(density)
        return most if caps is None else np.minimum(most, caps)

    def _run_beside(self, job: Callable[[], None], tensors: list[Tensor]) -> None:
        """Enqueue a job on the side stream, after what the current stream has done; the host does not wait."""
        device = tensors[0].device
        # What was made on this stream is not to be given away before the side stream has read it.
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            job()
        for tensor in tensors:
            if tensor.device == device:
                tensor.record_stream(self._stream)

    # ------------------------------------------------------------------- on the exchange thread, or the side stream

    def _run(self, group: list[_Bucket], plan: Plan, ballots: Tensor | None, scale: Tensor, is_last: bool) -> None:
        """Exchange a group, write its verdicts into the buckets, and fulfil their futures; never raises."""
        try:
            if self._error is None:
                self._vote([bucket.gradient for bucket in group], plan, ballots, scale)
                if self._in_backward:
                    self._registry.mark_verdicts(row for bucket in group for row in bucket.rows)
                if is_last:
                    self._agree(group)
                    self._end_step()
        except BaseException as error:  # noqa: BLE001  (it is raised again where the user can see it)
            assert self.exchange is not None
            self._error = VoteError(
                f"the vote on {self._describe(group)} failed in step {self._counts.num_steps} on "
                f"{self.exchange.describe()}: {type(error).__name__}: {error}"
            )
            self._error.__cause__ = error
        for bucket in group:
            if self._error is not None:
                # Whatever the caller does about the error, nothing may be trained on it.
                bucket.gradient.fill_(math.nan)
            if self._error is None or self._in_backward:
                bucket.future.set_result(bucket.gradient)
            else:
                bucket.future.set_exception(self._error)  # type: ignore[arg-type]

    def _describe(self, group: list[_Bucket]) -> str:
        rows = [row for bucket in group for row in bucket.rows]
        names = [name for row in rows if (name := self._registry.name(row)) is not None]
        elements = f"{len(rows)} parameters, {sum(bucket.gradient.numel() for bucket in group):,} elements"
        first = f"{names[0]} to {names[-1]}" if len(names) > 1 else "".join(names) or "unnamed"
        return f"{len(group)} bucket(s), {first} ({elements})"

    def _vote(self, gradients: list[Tensor], plan: Plan, ballots: Tensor | None, scale: Tensor) -> None:
        assert self.exchange is not None
        exchange, column = self.exchange, plan.columns[self.exchange.local_rank]
        if ballots is None:
            ballots = self.cast(column, *self._mean_in_node(gradients, plan), scale)
        kernels = kernels_for(ballots.device)
        starts = rotating_starts(column.layout, self._counts.num_steps)
        payloads = [exchange.vote(column.ballots, column.verdicts, ballots, self.memory.owner, starts, kernels)]
        if self.options.ranks_per_node > 1:
            payloads = exchange.share_in_node(payloads[0], [each.verdicts.buffer_bytes for each in plan.columns])
        self.take(gradients, plan, payloads, scale)

    def take(self, gradients: list[Tensor], plan: Plan, payloads: list[Tensor], scale: Tensor) -> None:
        """Write a group's verdicts, of each column those of all its owners, over the gradients of its buckets."""
        assert self.exchange is not None
        device = payloads[0].device
        # Half precision is written by way of float32.
        out = [gradient.float() for gradient in gradients]
        poisoned = torch.zeros((), dtype=torch.bool, device=device)
        pairs = enumerate(zip(plan.columns, payloads, strict=True))
        read = [self.exchange.read(each.verdicts, payload, kernels_for(device), k) for k, (each, payload) in pairs]
        seen: list[Tensor] = []
        for each, found in zip(plan.columns, read, strict=True):
            poisoned = poisoned | found.poisoned
            seen.append(self._write(gradients, out, each, found, scale))
        verdicts, _, _, lengths = torch.stack([each.sum(1) for each in seen]).sum(0)
        self._counts.verdicts(lengths, verdicts)
        self.memory.observe(plan, seen)
        self._poisoned = self._poisoned | poisoned
        for gradient, wide in zip(gradients, out, strict=True):
            if wide is not gradient:
                gradient.copy_(wide)
            if gradient.device.type != "cpu":
                gradient.masked_fill_(poisoned, math.nan)
            elif poisoned:
                gradient.fill_(math.nan)

    def _mean_in_node(self, gradients: list[Tensor], plan: Plan) -> tuple[list[Tensor], Tensor]:
        """Return the node's mean gradient on this rank's share: per bucket what is voted on, and what is averaged."""
        assert self.exchange is not None
        buffer = torch.cat(
            [gradients[k][a : a + n] for each in plan.columns for k, a, n in (*each.voted_runs, *each.raw_runs)]
        )
        mean = self.exchange.mean_in_node(buffer, [each.num_elements for each in plan.columns])
        column = plan.columns[self.exchange.local_rank]
        *voted, raw = torch.split(mean, [*column.num_voted, column.num_raw])
        return voted, raw

    def _write(
        self, gradients: list[Tensor], out: list[Tensor], column: Column, found: Verdicts, scale: Tensor
    ) -> Tensor:
        """Write a column's verdicts and averages into float32 buckets; return what `Column.seen` makes of them."""
        kernels = kernels_for(found.planes.device)
        counts = torch.zeros_like(column.piece_length)
        for gradient, wide, pieces in zip(gradients, out, column.targets, strict=True):
            # In half precision a loss scale may be out of range, and an infinity would read as a bad number.
            value = scale.clamp(max=torch.finfo(gradient.dtype).max).float()
            mine = kernels.unpack(found.planes, pieces, value, wide)
            counts[: mine.numel()] += mine
        means = torch.split(found.mean, [length for _, _, length in column.raw_runs])
        for (k, start, length), mean in zip(column.raw_runs, means, strict=True):
            out[k][start : start + length] = mean
        return column.seen(counts, found.crowded)

    def _agree(self, group: list[_Bucket]) -> None:
        """Let all ranks learn what any has seen amiss; on CUDA that poisons the step on all of them."""
        assert self.exchange is not None
        inspection = self.exchange.inspection
        amiss = inspection.agree(self._poisoned)
        if inspection.reports and inspection.defers(amiss.device):
            self._poisoned = self._poisoned | amiss
            for bucket in group:
                bucket.gradient.masked_fill_(amiss, math.nan)

    def _end_step(self) -> None:
        self.memory.commit(self._poisoned, self._unfit)
        self._counts.end_step(self._poisoned)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[str, int]) -> None:
        """Go on from what `memory.state_dict` returned, after `meet`; the parameters are known by name."""
        self._await_votes()  # of a step that broke off
        self.memory.load_state_dict(state, names, self._planner.voted_lengths(self._column))
        self._room = None

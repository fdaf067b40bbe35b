"""The DDP communication hook and its state.

A bucket's way: gradient -> confidence -> ballots -> pack -> exchange (tally, verdict) -> unpack into the bucket.
Packing happens where DDP calls the hook, in the middle of backward; the exchange, and what follows it, on the exchange
thread (CPU) or on a side stream (CUDA), while backward goes on.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from distsign.agreement import require_agreement
from distsign.confidence import Confidence
from distsign.exchange import EXCHANGES, ExchangeThread, VoteExchange, payload_headers, world_size_of
from distsign.kernels import kernels_for
from distsign.layout import Layout, Shape
from distsign.registry import ParameterRegistry, VoteError
from distsign.statistics import VoteCounts
from distsign.traffic import ExchangeBytes, Traffic
from distsign.vote import require_margin
from distsign.voter import Voter

__all__ = ["SignVoteState", "VoteError", "sign_vote_hook"]

# No postponed annotations in this file: DDP compares those of a hook with the classes themselves.

_COALESCE_BYTES = 64 * 1024
"""Buckets whose payloads are smaller travel together: twelve small exchanges cost about 50 ms more than one."""

_STATE_FORMAT = 1


@dataclass(frozen=True)
class _Bucket:
    """What is needed of a `GradBucket`, which must not be kept after the hook returned."""

    gradient: Tensor
    rows: tuple[int, ...]
    future: Future[Tensor]


@dataclass(frozen=True)
class _Plan:
    """Everything about an exchange group that depends on its shape alone."""

    layout: Layout
    rows: Tensor
    blank: Tensor
    poison: Tensor


class SignVoteState:
    """Options and memory of `sign_vote_hook`: one a model, registered with it.

    Args:
        process_group: the ranks that vote, the same as DDP's; None is the default group.
        confidence: which components vote: `FixedConfidence`, `AdaptiveConfidence` or `TargetDensity`.
        margin: least lead, `abs(tally) >= margin`, for a verdict other than 0. `f + 1` means that no verdict but 0 is
            without an honest vote behind it, whatever `f` colluding voters send.
        carry: keep what was not sent for the next step. Not in this version: must be False.
        owner_carry: keep undecided votes at the owner. Not in this version: must be False.
        exchange: `"two_phase"`: bytes per rank flat in the number of ranks; `"all_gather"`: each rank counts all
            ballots itself and trusts no owner, at `(world_size - 1)` times the bytes of one rank's ballots.
        wire: `"planes"`, two bits a component, or `"auto"`, which is the same in this version.
        bits_per_param: a budget. Not in this version: must be None.
        l2: `l2 * parameter` is added to each worker's raw gradient before the confidence (L2 regularisation as in
            arXiv 1907.09008's plain variants). Prefer the optimizer's decoupled `weight_decay`.
        exclude: parameters to average instead. Not in this version: must be None.
        ranks_per_node: for the hierarchical exchange. Not in this version: must be None.

    Attributes:
        loss_scale: None, a number, or a `torch.amp.GradScaler`: the factor that the loss, and so the gradient, carries.
            Set it under loss scaling: thresholds and statistics are in true gradient units.

    Raises:
        ValueError: if an option is out of range or not in this version; at the first step, if the ranks' options
            differ.

    Example:
        >>> from distsign import AdaptiveConfidence
        >>> state = SignVoteState(confidence=AdaptiveConfidence(), margin=1)
        >>> state.traffic().num_steps
        0
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        confidence: Confidence,
        margin: int = 1,
        carry: bool = False,
        owner_carry: bool = False,
        exchange: str = "two_phase",
        wire: str = "auto",
        bits_per_param: float | None = None,
        l2: float = 0.0,
        exclude: Iterable[str] | None = None,
        ranks_per_node: int | None = None,
    ) -> None:
        if not isinstance(confidence, Confidence):
            raise ValueError(
                f"confidence must be a confidence function such as AdaptiveConfidence(), got {confidence!r}"
            )
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if wire not in ("auto", "planes"):
            raise ValueError(f"wire must be 'auto' or 'planes', got {wire!r}")
        if isinstance(l2, bool) or not (isinstance(l2, (int, float)) and 0.0 <= l2 < math.inf):
            raise ValueError(f"l2 must be a number of at least 0, got {l2!r}")
        if confidence.requires_carry:
            raise ValueError(f"{confidence!r} requires a carry, which this version of distsign does not keep yet")
        _refuse_until_later(carry=carry, owner_carry=owner_carry, bits_per_param=bits_per_param)
        _refuse_until_later(exclude=exclude, ranks_per_node=ranks_per_node)
        # Hyperparameters
        self.process_group = process_group
        self.confidence = confidence
        self.margin = require_margin(margin)
        if dist.is_available() and dist.is_initialized():
            require_margin(margin, world_size_of(process_group))
        self.exchange = exchange
        self.wire = wire
        self.l2 = float(l2)
        self.loss_scale: Any = None
        # Internal state
        self._registry = ParameterRegistry()
        self._voter = Voter(confidence)
        self._exchange: VoteExchange | None = None
        self._thread = ExchangeThread("distsign-exchange")
        self._plans: dict[tuple[tuple[int, ...], ...], _Plan] = {}
        self._group: list[_Bucket] = []
        self._error: VoteError | None = None
        self._in_backward = False
        self._device: torch.device | None = None
        self._poisoned = torch.zeros((), dtype=torch.bool)
        self._stream: torch.cuda.Stream | None = None
        # Statistics
        self._counts = VoteCounts()
        self._counted_before = ExchangeBytes()
        self._num_local_steps = 0

    # ------------------------------------------------------------------------------------------------- what users call

    def track(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Give the state its parameters' names, under which `state_dict` files what is kept for each.

        Args:
            named_parameters: `model.named_parameters()`.
        """
        self._registry.track(named_parameters)

    def lr_scale(self, parameter: Tensor) -> float | Tensor:
        """Return the factor on this step's learning rate for a parameter, alike on all ranks; 1 without a warm-up.

        Raises:
            VoteError: if the hook has not run although there are several ranks: their gradients were never exchanged.
        """
        del parameter
        self._raise_if_broken()
        if self._counts.num_steps == 0 and world_size_of(self.process_group) > 1:
            raise VoteError(
                "the optimizer has this SignVoteState, but no bucket has reached its hook, so the ranks would train "
                "apart: wrap the model in DistributedDataParallel and call "
                "model.register_comm_hook(state, sign_vote_hook) before the first backward"
            )
        return 1.0

    def traffic(self) -> Traffic:
        """Return bytes and densities of this rank so far. On CUDA this waits for the device."""
        self._raise_if_broken()
        if self._exchange is not None:
            self._exchange.raise_if_mismatched()
        return self._counts.traffic(self._counted(), world_size_of(self.process_group))

    def _counted(self) -> ExchangeBytes:
        return self._counted_before + self._exchange.counted if self._exchange is not None else self._counted_before

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-exact resume needs from this rank; each rank has its own.

        Raises:
            ValueError: if the parameters' names are not known: pass `vote_state=state` to the optimizer, or call
                `state.track(model.named_parameters())`.
        """
        names = self._registry.names()
        stats = self._voter.stats
        return {
            "format": _STATE_FORMAT,
            "confidence": repr(self.confidence),
            "counts": self._counts.state_dict(),
            "traffic": asdict(self._counted()),
            "stats": {name: stats[row].clone() for name, row in names.items() if row < stats.shape[0]},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of the same rank.

        Raises:
            ValueError: if it is of another format, another model or another confidence function, or if the parameters'
                names are not known yet.
        """
        if state_dict.get("format") != _STATE_FORMAT:
            raise ValueError(
                f"this is no SignVoteState of format {_STATE_FORMAT}: its format is {state_dict.get('format')!r}. "
                "Load a checkpoint of this version, or start anew"
            )
        names = self._registry.names()
        stats: Mapping[str, Tensor] = state_dict["stats"]
        strangers = sorted(stats.keys() - names.keys())
        if strangers:
            raise ValueError(
                f"the checkpoint holds parameters that this model does not have, {strangers[0]!r} among "
                f"{len(strangers)}: load the checkpoint of this model"
            )
        if state_dict["confidence"] != repr(self.confidence):
            raise ValueError(
                f"the checkpoint was written with {state_dict['confidence']}, whose statistics mean nothing to "
                f"{self.confidence!r}: use the confidence function that the checkpoint was written with"
            )
        self._counts.load_state_dict(state_dict["counts"])
        self._counted_before = ExchangeBytes(**state_dict["traffic"])
        if self._exchange is not None:
            self._exchange.counted = ExchangeBytes()
        device = self._voter.stats.device
        self._voter = Voter(self.confidence)
        self._voter.grow(len(self._registry), device)
        for name, row in stats.items():
            self._voter.stats[names[name]] = row.to(device)

    def sync_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer's state equal on all ranks, after training under `Join` with uneven inputs.

        A rank that joined early missed the last steps. DDP copies the parameters from the rank that trained longest;
        this does the same for the optimizer. All ranks must call it, once, after the `Join` block.

        Args:
            optimizer: any `torch.optim.Optimizer`; its state and its groups' options are overwritten.
        """
        if self._exchange is None:
            self._exchange = VoteExchange(self.process_group, self.exchange)
        exchange = self._exchange
        steps = exchange.gather(self._num_local_steps)
        source = max(range(len(steps)), key=lambda rank: (steps[rank], rank))
        optimizer.load_state_dict(exchange.broadcast(optimizer.state_dict(), source))
        self._num_local_steps = 0  # the ranks are level again

    def close(self) -> None:
        """End the exchange thread and give its process group back. The state must not be used afterwards.

        Call it before `dist.destroy_process_group()`; a process that ends need not.
        """
        self._thread.close()
        if self._exchange is not None:
            self._exchange.close()

    # ---------------------------------------------------------------------------------------------- what the hook does

    def _on_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        self._raise_if_broken()
        gradient = bucket.buffer()
        device = gradient.device
        self._check_bucket(bucket)
        rows = tuple(self._registry.see(parameter) for parameter in bucket.parameters())
        if self._exchange is None:
            self._exchange = self._start(bucket, rows)
        if bucket.index() == 0:
            self._begin_step()
        future: Future[Tensor] = Future() if device.type == "cpu" else Future(devices=[device])
        self._voter.grow(len(self._registry), device)
        if self.l2:
            self._add_l2(bucket)
        self._group.append(_Bucket(gradient, rows, future))
        payload_bytes = sum(waiting.gradient.numel() for waiting in self._group) // 4
        if payload_bytes >= _COALESCE_BYTES or bucket.is_last():
            self._flush(is_last=bucket.is_last())
        return future

    def _check_bucket(self, bucket: GradBucket) -> None:
        gradient = bucket.buffer()
        # Of the parameters: DDP shows the gradients of complex ones as real numbers.
        strange = [p.dtype for p in bucket.parameters() if not p.is_floating_point()]
        if strange:
            raise ValueError(
                f"gradients must be float32, bfloat16 or float16 to be voted on, got {strange[0]}: the sign of a "
                "complex number is not in {-1, 0, +1}; make such parameters real, or keep them out of DDP"
            )
        if self._device is None:
            self._device = gradient.device
        if gradient.device != self._device:
            raise ValueError(
                f"one SignVoteState votes on one device, {self._device}, but a bucket on {gradient.device} came: keep "
                "the model on one device a rank, and use one state a model"
            )
        if gradient.dtype == torch.float16 and self.confidence.raw_units and self.loss_scale is None:
            raise ValueError(
                f"{self.confidence!r} is in units of the raw gradient, and float16 gradients usually carry a "
                "loss scale that is not known here: set state.loss_scale to the GradScaler, or to 1.0 if there is none"
            )

    def _start(self, bucket: GradBucket, rows: tuple[int, ...]) -> VoteExchange:
        kernels_for(bucket.buffer().device)  # compiles the first time: before others wait for this rank under a timeout
        exchange = VoteExchange(self.process_group, self.exchange)
        scale = self.loss_scale
        options: dict[str, object] = {
            "confidence": self.confidence,
            "margin": self.margin,
            "exchange": self.exchange,
            "wire": self.wire,
            "l2": self.l2,
            "loss_scale": scale if scale is None or isinstance(scale, (int, float)) else type(scale).__name__,
            "number of buckets": "several" if not bucket.is_last() else 1,
            "dtype of the first bucket": bucket.buffer().dtype,
            "parameters of the first bucket": [
                (row, self._registry.name(row), tuple(p.shape))
                for row, p in zip(rows, bucket.parameters(), strict=True)
            ],
        }
        require_agreement(exchange.gather(options))
        require_margin(self.margin, exchange.world_size)
        return exchange

    def _begin_step(self) -> None:
        # Something is left here only after a step that broke off, and its other half is lost.
        self._thread.wait()
        self._group.clear()
        self._voter.begin_step()
        self._counts.begin_step()
        self._poisoned = torch.zeros((), dtype=torch.bool)
        # Outside of backward DDP calls the hook with zeros, for a rank that has joined (`Join`, uneven inputs).
        self._in_backward = torch._C._current_graph_task_id() != -1
        if self._in_backward:
            self._num_local_steps += 1
            # An error set on a Future reaches the user as "Unable to cast ... to Tensor"; raised from a callback of the
            # autograd engine it leaves backward as it is.
            torch.autograd.Variable._execution_engine.queue_callback(self._await_step)

    def _await_step(self) -> None:
        self._thread.wait()
        self._raise_if_broken()

    def _scale(self, device: torch.device) -> Tensor:
        scale = self.loss_scale
        if scale is None:
            scale = 1.0
        elif not isinstance(scale, (int, float, Tensor)):
            on_device = getattr(scale, "_scale", None)  # get_scale() would wait for the device
            scale = on_device if isinstance(on_device, Tensor) else scale.get_scale()
        return torch.as_tensor(scale, dtype=torch.float64, device=device).reshape(())

    def _add_l2(self, bucket: GradBucket) -> None:
        scale = self._scale(bucket.buffer().device)
        for gradient, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True):
            # A parameter without a gradient of its own (unused, or a rank that has joined) must not vote for decay.
            factor = (self.l2 * scale * gradient.any()).to(gradient.dtype)
            gradient.add_(parameter.detach().to(gradient.dtype) * factor)

    def _plan(self, device: torch.device) -> _Plan:
        key = tuple(bucket.rows for bucket in self._group)
        if key not in self._plans:
            assert self._exchange is not None
            shapes = [[Shape(row, self._registry.num_elements(row)) for row in rows] for rows in key]
            layout = Layout.build(shapes, self._exchange.world_size)
            self._plans[key] = _Plan(
                layout,
                torch.tensor([row for rows in key for row in rows], device=device),
                payload_headers(layout, device),
                payload_headers(layout, device, poison=True),
            )
        return self._plans[key]

    def _flush(self, *, is_last: bool) -> None:
        """Cast the ballots of the buckets that have gathered, and send them on their way."""
        device = self._group[0].gradient.device
        plan = self._plan(device)
        kernels = kernels_for(device)
        group, self._group = self._group, []
        scale = self._scale(device)
        ballots = plan.blank.clone()
        count, finite = self._voter.cast(
            [bucket.gradient.float() for bucket in group],
            plan.layout,
            plan.rows,
            scale=scale,
            kernels=kernels,
            out=ballots,
        )
        ballots = torch.where(finite, ballots, plan.poison)
        self._counts.ballots(sum(plan.layout.lengths), count)
        job = partial(self._run, group, plan, ballots, scale, is_last)
        if device.type == "cpu":
            self._thread.submit(job)
        else:
            self._run_beside(job, [ballots, scale, *(bucket.gradient for bucket in group)])

    def _run_beside(self, job: partial[None], tensors: list[Tensor]) -> None:
        """Enqueue a job on the side stream, after what the current stream has done; the host does not wait."""
        device = tensors[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            job()
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def _run(self, group: list[_Bucket], plan: _Plan, ballots: Tensor, scale: Tensor, is_last: bool) -> None:
        """Exchange a group, write its verdicts into the buckets, and fulfil their futures; never raises."""
        try:
            if self._error is None:
                self._vote(group, plan, ballots, scale)
                if self._in_backward:
                    self._registry.mark_verdicts(row for bucket in group for row in bucket.rows)
                if is_last:
                    self._end_step()
        except BaseException as error:  # noqa: BLE001  (it is raised again where the user can see it)
            assert self._exchange is not None
            self._error = VoteError(
                f"the vote on {len(group)} bucket(s) of {plan.layout.num_elements:,} elements failed on "
                f"{self._exchange.describe()}: {type(error).__name__}: {error}"
            )
            self._error.__cause__ = error
        for bucket in group:
            if self._error is not None:
                bucket.gradient.fill_(
                    math.nan
                )  # whatever the caller does about the error, nothing may be trained on it
            if self._error is None or self._in_backward:
                bucket.future.set_result(bucket.gradient)
            else:
                bucket.future.set_exception(self._error)  # type: ignore[arg-type]

    def _vote(self, group: list[_Bucket], plan: _Plan, ballots: Tensor, scale: Tensor) -> None:
        assert self._exchange is not None
        kernels = kernels_for(ballots.device)
        verdicts, poisoned = self._exchange.vote(plan.layout, ballots, self.margin, kernels)
        self._poisoned = self._poisoned.to(poisoned.device) | poisoned
        for bucket, pieces in zip(group, plan.layout.pieces, strict=True):
            gradient = bucket.gradient
            out = gradient if gradient.dtype == torch.float32 else torch.empty_like(gradient, dtype=torch.float32)
            # In half precision a loss scale may be out of range, and an infinity would read as a bad number.
            value = scale.clamp(max=torch.finfo(gradient.dtype).max).float()
            self._counts.verdicts(kernels.unpack(verdicts, pieces, value, out).sum())
            if out is not gradient:
                gradient.copy_(out)
            if gradient.device.type != "cpu":
                gradient.masked_fill_(poisoned, math.nan)
            elif poisoned:
                gradient.fill_(math.nan)

    def _end_step(self) -> None:
        self._voter.commit(self._poisoned)
        self._counts.end_step(self._poisoned)

    def _raise_if_broken(self) -> None:
        if self._error is not None:
            raise self._error


def sign_vote_hook(state: SignVoteState, bucket: GradBucket) -> Future[Tensor]:
    """Replace a bucket's gradients by the majority's verdicts, -1, 0 or +1.

    1. Each worker casts ballots: the sign of each component where it is confident, else an abstention.
    2. Ballots travel, two bits each, to the rank that owns the component; it counts them.
    3. Verdicts travel back to all ranks and are written into the bucket (times the loss scale, where one is known).

    A worker whose bucket holds a NaN or an infinity sends poison instead, and the bucket becomes NaN on every rank.

    Args:
        state: the model's `SignVoteState`.
        bucket: what DDP hands over.

    Returns:
        A future of the bucket's flat gradient.

    Raises:
        TypeError: if the model is not wrapped in `DistributedDataParallel`.

    Example:
        model = DistributedDataParallel(net)
        state = SignVoteState(confidence=AdaptiveConfidence())
        model.register_comm_hook(state, sign_vote_hook)
    """
    if not isinstance(bucket, GradBucket):
        raise TypeError(
            f"sign_vote_hook is a communication hook of DistributedDataParallel and expects its buckets, but got "
            f"{type(bucket).__name__}: wrap the model in torch.nn.parallel.DistributedDataParallel and register the "
            "hook there with model.register_comm_hook(state, sign_vote_hook)"
        )
    if not isinstance(state, SignVoteState):
        raise TypeError(
            f"sign_vote_hook needs a SignVoteState, got {type(state).__name__}: call "
            "model.register_comm_hook(SignVoteState(confidence=...), sign_vote_hook)"
        )
    return state._on_bucket(bucket)


def _refuse_until_later(**options: object) -> None:
    for name, value in options.items():
        if value not in (None, False, (), []):
            raise ValueError(
                f"{name}={value!r} is not in this version of distsign, it comes with a later one: leave it out"
            )

"""The DDP communication hook and its state: what users see of a vote.

A bucket's way is in `pipeline`.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from distsign.agreement import require_agreement
from distsign.collectives import Link, rank_in, world_size_of
from distsign.confidence import Confidence
from distsign.exchange import VoteExchange
from distsign.kernels import kernels_for
from distsign.options import VoteOptions
from distsign.pipeline import VotePipeline
from distsign.registry import ParameterRegistry, VoteError
from distsign.statistics import VoteCounts
from distsign.traffic import ExchangeBytes, Traffic
from distsign.vote import require_margin

__all__ = ["SignVoteState", "VoteError", "sign_vote_hook"]

# No postponed annotations in this file: DDP compares those of a hook with the classes themselves.

_STATE_FORMAT = 3
_log = logging.getLogger(__name__)

NUM_STEPS_TO_ASK_IN = 20
"""Within which an optimizer must have asked for its rate's factor: a `GradScaler` may leave out 17 at first."""


class SignVoteState:
    """Options and memory of `sign_vote_hook`: one a model, registered with it.

    Args:
        process_group: the ranks that vote, the same as DDP's; None is the default group.
        confidence: which components vote: `RMSConfidence`, `FixedConfidence`, `AdaptiveConfidence` or `TargetDensity`.
        margin: least lead, `abs(tally) >= margin`, for a verdict other than 0. `f + 1` means that no verdict but 0 is
            without an honest vote behind it, whatever `f` colluding voters send.
        carry: keep at each worker what was not sent and add it to the next gradient: True (float32), `torch.bfloat16`
            or False. None: where the confidence function or a budget requires it. Two copies are held, so that a
            poisoned step leaves no trace: 8 bytes a parameter in float32, and 8 more for the mean of squares of
            `RMSConfidence`; half of that in bfloat16, in which packing takes 0.7 of the time.
        owner_carry: keep undecided votes at the owner: True or `"plain"`, the sum of the votes, of which a verdict
            takes `margin` (4 bytes a parameter over all ranks); `"standing"`, one pending ballot a worker and
            component, where workers may lie: a plain carry lets a liar save votes up until they pass any margin; False.
            None: where a budget requires it.
        exchange: `"two_phase"`: bytes per rank flat in the number of ranks; `"all_gather"`: each rank counts all
            ballots itself and trusts no owner, at `(world_size - 1)` times the bytes of one rank's ballots.
        wire: `"planes"`, two bits a component; `"sparse"`, the positions of the votes (needs a carry); `"auto"`, the
            shorter of both. Without a budget the number of slots follows the counts that all ranks have seen.
        bits_per_param: a budget of bits per parameter and direction, headers included. Payloads then have this size in
            every step. Thresholds in gradient units are steered, per parameter, to fill it, and what does not fit stays
            in the carries; `RMSConfidence` keeps its k and forgets what does not fit. All parameters must be known
            before the first backward: pass `vote_state=state` and `model.named_parameters()` to the optimizer, or call
            `track`.
        l2: `l2 * parameter` is added to each worker's raw gradient before the confidence (L2 regularisation as in
            arXiv 1907.09008's plain variants). Prefer the optimizer's decoupled `weight_decay`.
        exclude: names of parameters (norms, embeddings) that are averaged in float32 instead of voted on, in the same
            payloads; their `.grad` is then the mean gradient.
        ranks_per_node: consecutive ranks that make a node, with `exchange="hierarchical"`. None: `LOCAL_WORLD_SIZE`,
            which torchrun sets; required with a process group of its own.
        checksum: end each payload with 4 bytes of XXH3 and hold it to them on arrival. A payload that was damaged on
            its way is then an error at once on the rank that got it, which names who wrote it, and does not take the
            step; the others end as where a rank dies. On CUDA, where the host waits for nothing, no rank takes the step
            and `traffic()` raises; there all ranks tell each other at the end of a step, in one small all-gather.
            Else a damaged payload may still be one, of other votes. Not covered are the gradients that a node averages
            among itself, and what never leaves a rank.
        max_density: largest share of the components of an owner's shard on which a worker may vote. An owner counts
            the votes itself and treats a denser payload as abstentions, so that liars cannot outvote honest workers by
            voting where these abstain. Honest workers keep to it by themselves, parameter by parameter: what has no
            room waits in the carry, or is lost where there is none, as in the first steps of a warm-up. Choose two to
            three times the density that `traffic()` reports in an honest run. None: no cap.
        max_poison_streak: N, to leave a worker out that has sent poison (NaN, infinity) in N steps in a row, or in the
            long run in more than one step of N + 1, until it has sent none for N in a row: its ballots are
            abstentions and its poison is ignored. It is named by a warning of `logging` and in `traffic()`. Take 20 or
            more with a `GradScaler`, which may need 17 steps to find its scale. Steps that half of the workers or more
            poison do not count. Costs one small all-gather in each step with poison and in each while a worker is left
            out, on CUDA in all, but for `exchange="all_gather"`, where alone it holds against liars: else owners are
            believed, who may accuse others. None: a NaN on one rank is taken seriously for ever, as without liars it
            should be.

    Attributes:
        loss_scale: None, a number, or a `torch.amp.GradScaler`: the factor that the loss, and so the gradient, carries.
            Set it under loss scaling: thresholds, statistics and carries are in true gradient units.

    Raises:
        ValueError: if an option is out of range; at the first step, if the ranks' options differ, or if a budget is
            impossible for the model.

    Example:
        >>> from distsign import RMSConfidence
        >>> state = SignVoteState(confidence=RMSConfidence(k=24), bits_per_param=0.05)
        >>> state.traffic().num_steps
        0
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        confidence: Confidence,
        margin: int = 1,
        carry: bool | torch.dtype | None = None,
        owner_carry: bool | str | None = None,
        exchange: str = "two_phase",
        wire: str = "auto",
        bits_per_param: float | None = None,
        l2: float = 0.0,
        exclude: Iterable[str] | None = None,
        ranks_per_node: int | None = None,
        checksum: bool = False,
        max_density: float | None = None,
        max_poison_streak: int | None = None,
    ) -> None:
        self._options = VoteOptions.check(
            confidence=confidence,
            margin=margin,
            carry=carry,
            owner_carry=owner_carry,
            exchange=exchange,
            wire=wire,
            bits_per_param=bits_per_param,
            l2=l2,
            exclude=exclude,
            ranks_per_node=ranks_per_node,
            is_subgroup=process_group is not None,
            checksum=checksum,
            max_density=max_density,
            max_poison_streak=max_poison_streak,
        )
        if dist.is_available() and dist.is_initialized():
            require_margin(margin, world_size_of(process_group) // self._options.ranks_per_node)
        self.process_group = process_group
        self.loss_scale: Any = None
        self._registry = ParameterRegistry()
        self._counts = VoteCounts()
        self._counted_before = ExchangeBytes()
        self._pipeline = VotePipeline(self._options, self._registry, self._counts)
        self._device: torch.device | None = None
        self._lr_is_scaled = not self._pipeline.memory.steering.scales_lr  # or somebody has asked for the factor
        self._scale_matters = confidence.raw_units  # until a verdict shows that there is no scale

    # ------------------------------------------------------------------------------------------------- what users call

    @property
    def ranks_per_node(self) -> int:
        """Ranks that vote as one: of a node in the hierarchical exchange, else 1."""
        return self._options.ranks_per_node

    def track(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Give the state its parameters' names, under which `state_dict` files what is kept for each.

        Args:
            named_parameters: `model.named_parameters()`.
        """
        self._registry.track(named_parameters)

    def require_budget(self) -> None:
        """Hold `bits_per_param` to the parameters that `track` has seen, all of the model: now, not in the first step.

        Without a budget there is nothing to hold.

        Raises:
            ValueError: if the budget is too small or too large for them, `exclude` names one that is not there, or
                ranks do not divide into nodes.
        """
        if self._options.bits_per_param is not None:
            self._meet()

    def lr_scale(self, parameter: Tensor) -> float | Tensor:
        """Return the factor on this step's learning rate for a parameter, alike on all ranks.

        It is 1 but for a warm-up of the confidence function. A float on the CPU, a scalar tensor elsewhere.

        Raises:
            VoteError: if the hook has not run although there are several ranks: their gradients were never exchanged;
                or has not seen this parameter, which has a gradient. If a threshold is in units of the raw gradient and
                the first verdicts that are not 0 come unscaled by a `GradScaler` that is not the `loss_scale`.
        """
        self._pipeline.raise_if_broken()
        self._lr_is_scaled = True
        if self._counts.num_steps == 0:
            if world_size_of(self.process_group) > 1:
                raise VoteError(
                    "the optimizer has this SignVoteState, but no bucket has reached its hook, so the ranks would "
                    "train apart: wrap the model in DistributedDataParallel and call "
                    "model.register_comm_hook(state, sign_vote_hook) before the first backward"
                )
            return 1.0
        row = self._registry.row(parameter)
        if self._scale_matters and self.loss_scale is None:
            self._require_no_scale(parameter, row)
        return self._pipeline.lr_scale()

    def _require_no_scale(self, parameter: Tensor, row: int | None) -> None:
        """Refuse first verdicts that a loss scale has divided: a power of two, which clipping leaves none."""
        grad = parameter.grad
        if grad is None or not grad.numel():
            return
        vote = float(torch.linalg.vector_norm(grad, math.inf))  # on CUDA waits for the device, until a vote was seen
        if vote == 0.0 or not math.isfinite(vote) or row in self._registry.rows_of(self._options.exclude):
            return
        if vote != 1.0 and math.frexp(vote)[0] == 0.5:
            raise VoteError(
                f"the threshold of {self._options.confidence!r} is in units of the raw gradient, but verdicts came to "
                f"the optimizer as {vote:.3g} instead of 1: a GradScaler divided them by its scale, so that ballots "
                f"were cast on gradients {1 / vote:.6g} times too large. Set state.loss_scale to the GradScaler, or to "
                "1.0 if there is none"
            )
        self._scale_matters = False

    def traffic(self) -> Traffic:
        """Return bytes and densities of this rank so far. On CUDA this waits for the device."""
        self._pipeline.raise_if_broken()
        if self._pipeline.exchange is not None:
            self._pipeline.exchange.inspection.raise_if_mismatched()
        left_out = self._pipeline.memory.admission.numbers()
        return self._counts.traffic(self._counted(), world_size_of(self.process_group), left_out)

    def _counted(self) -> ExchangeBytes:
        exchange = self._pipeline.exchange
        return self._counted_before if exchange is None else self._counted_before + exchange.counted

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-exact resume needs from this rank; each rank has its own.

        Raises:
            ValueError: if the parameters' names are not known: pass `vote_state=state` to the optimizer, or call
                `state.track(model.named_parameters())`.
        """
        return {
            "format": _STATE_FORMAT,
            "confidence": repr(self._options.confidence),
            "counts": self._counts.state_dict(),
            "traffic": asdict(self._counted()),
            **self._pipeline.memory.state_dict(self._registry.names()),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of the same rank.

        Raises:
            ValueError: if it is of another format, another model, other options or another number of ranks, or if the
                parameters' names are not known yet.
        """
        if state_dict.get("format") != _STATE_FORMAT:
            raise ValueError(
                f"this is no SignVoteState of format {_STATE_FORMAT}: its format is {state_dict.get('format')!r}. "
                "Load a checkpoint of this version, or start anew"
            )
        names = self._registry.names()
        kept = state_dict["voter"].keys()
        lost, new = kept - names.keys(), names.keys() - kept
        if lost:
            raise ValueError(
                f"the checkpoint, and not this model, has the parameter {min(lost)!r}, one of {len(lost)} that would "
                "be lost: load the checkpoint of this model"
            )
        if kept and new and rank_in(self.process_group) == 0:  # before the first step there are none
            _log.warning(
                "this model, and not the checkpoint, has the parameter %r, one of %d whose votes begin anew",
                min(new),
                len(new),
            )
        if state_dict["confidence"] != repr(self._options.confidence):
            raise ValueError(
                f"the checkpoint was written with {state_dict['confidence']}, whose statistics mean nothing to "
                f"{self._options.confidence!r}: use the confidence function that the checkpoint was written with"
            )
        self._meet()
        self._pipeline.load_state_dict(state_dict, names)
        self._counts.load_state_dict(state_dict["counts"])
        self._counted_before = ExchangeBytes(**state_dict["traffic"])
        if self._pipeline.exchange is not None:
            self._pipeline.exchange.forget_counts()

    def sync_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer's state equal on all ranks, after training under `Join` with uneven inputs.

        A rank that joined early missed the last steps. DDP copies the parameters from the rank that trained longest;
        this does the same for the optimizer. All ranks must call it, once, after the `Join` block.

        Args:
            optimizer: any `torch.optim.Optimizer`; its state and its groups' options are overwritten.
        """
        if self._pipeline.exchange is None:
            self._pipeline.exchange = self._new_exchange()
        exchange = self._pipeline.exchange
        steps = exchange.gather(self._pipeline.num_local_steps)
        source = max(range(len(steps)), key=lambda rank: (steps[rank], rank))
        optimizer.load_state_dict(exchange.broadcast(optimizer.state_dict(), source))
        self._pipeline.num_local_steps = 0  # the ranks are level again

    def close(self) -> None:
        """End the exchange thread and give its process group back. The state must not be used afterwards.

        Call it before `dist.destroy_process_group()`; a process that ends need not.
        """
        self._pipeline.close()

    # ---------------------------------------------------------------------------------------------- what the hook does

    def _on_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        self._pipeline.raise_if_broken()
        self._check_bucket(bucket)
        if not self._pipeline.started:
            self._start(bucket)
        if not self._lr_is_scaled and self._pipeline.num_local_steps >= NUM_STEPS_TO_ASK_IN:
            self._warn_of_lr()
        return self._pipeline.on_bucket(bucket, self._scale(bucket.buffer().device))

    def _warn_of_lr(self) -> None:
        self._lr_is_scaled = True  # said once
        if rank_in(self.process_group) == 0:
            _log.warning(
                "%r warms up and wants smaller learning rates meanwhile, but after %d steps nobody has asked for the "
                "factor: give one of distsign's optimizers vote_state=state, or multiply the rate of another by "
                "state.lr_scale(parameter) before each step",
                self._options.confidence,
                self._pipeline.num_local_steps,
            )

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
        if gradient.dtype == torch.float16 and self._options.confidence.raw_units and self.loss_scale is None:
            raise ValueError(
                f"{self._options.confidence!r} is in units of the raw gradient, and float16 gradients usually carry a "
                "loss scale that is not known here: set state.loss_scale to the GradScaler, or to 1.0 if there is none"
            )

    def _start(self, bucket: GradBucket) -> None:
        # On the CPU this compiles the first time: before others wait for this rank under a timeout. Triton compiles in
        # the first steps.
        kernels_for(bucket.buffer().device)
        tracked = self._registry.is_named
        rows = [self._registry.see(parameter) for parameter in bucket.parameters()]
        exchange = self._pipeline.exchange or self._new_exchange()
        scale = self.loss_scale
        options: dict[str, object] = {
            **vars(self._options),
            # Of a checkpoint that some ranks alone have loaded: they would report poison in other steps than the rest.
            "poison that is held against workers": self._pipeline.memory.admission.state_dict(),
            "loss_scale": scale if scale is None or isinstance(scale, (int, float)) else type(scale).__name__,
            "number of buckets": "several" if not bucket.is_last() else 1,
            "dtype of the first bucket": bucket.buffer().dtype,
            "parameters of the first bucket": [
                (row, self._registry.name(row), tuple(p.shape))
                for row, p in zip(rows, bucket.parameters(), strict=True)
            ],
        }
        require_agreement(exchange.gather(options))
        require_margin(self._options.margin, exchange.num_voters)
        if exchange.num_voters == 1 and exchange.world_size > 1 and rank_in(self.process_group) == 0:
            _log.warning(
                "exchange='hierarchical' on one node of %d ranks: they average their gradients in full, and one voter "
                "votes. Only links between nodes are spared; ranks_per_node says which ranks make a node",
                exchange.world_size,
            )
        if not tracked and (self._options.bits_per_param is not None or self._options.exclude):
            raise ValueError(
                "bits_per_param and exclude speak of all parameters, which are not known: pass vote_state=state and "
                "model.named_parameters() to the optimizer, or call state.track(model.named_parameters()), before the "
                "first backward"
            )
        self._pipeline.start(exchange)

    def _meet(self) -> None:
        """Let the pipeline know this rank's place among all, before ranks have met."""
        self._pipeline.meet(self._num_nodes(), rank_in(self.process_group) % self._options.ranks_per_node)

    def _num_nodes(self) -> int:
        num_ranks, per_node = world_size_of(self.process_group), self._options.ranks_per_node
        if num_ranks % per_node:
            raise ValueError(
                f"ranks_per_node={per_node} does not divide the {num_ranks} ranks: nodes must be of one size"
            )
        return num_ranks // per_node

    def _new_exchange(self) -> VoteExchange:
        memory = self._pipeline.memory
        memory.meet(self._num_nodes())  # refuses nodes of different sizes before any group is made
        return VoteExchange(
            Link.twin(self.process_group),
            self._options.exchange,
            self._options.ranks_per_node,
            checksum=self._options.checksum,
            admission=memory.admission,
        )

    def _scale(self, device: torch.device) -> Tensor:
        scale = self.loss_scale
        if scale is None:
            scale = 1.0
        elif not isinstance(scale, (int, float, Tensor)):
            on_device = getattr(scale, "_scale", None)  # get_scale() would wait for the device
            scale = on_device if isinstance(on_device, Tensor) else scale.get_scale()
        if isinstance(scale, Tensor):
            return scale.to(device, torch.float64).reshape(())
        return torch.full((), float(scale), dtype=torch.float64, device=device)  # uploading would wait for the device


def sign_vote_hook(state: SignVoteState, bucket: GradBucket) -> Future[Tensor]:
    """Replace a bucket's gradients by the majority's verdicts, -1, 0 or +1.

    1. Each worker casts ballots: the sign of each component where it is confident, else an abstention.
    2. Ballots travel, two bits a component or fewer, to the rank that owns the component; it counts them.
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

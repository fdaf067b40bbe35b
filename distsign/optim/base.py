"""What the sign optimizers share: options, checkpoints, the skipped step, ballots, decay and the walk over tiles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from distsign.ballots import Kept, cast_ballots, cast_with_carry
from distsign.confidence import Confidence
from distsign.optim.arithmetic import Scalar, add_, gated, on_host, scale_, wide_dtype
from distsign.optim.options import (
    Group,
    VoteState,
    check_confidence,
    check_flag,
    check_lr,
    check_number,
    check_params,
    check_vote_state,
    describe,
    name_confidence,
)
from distsign.optim.sparse import Signs, signs_of
from distsign.optim.tiles import finite_on_devices, finite_on_host, tile_limit, tiles

__all__ = ["SignOptimizer"]

_Batch: TypeAlias = tuple[Scalar, list[tuple[Tensor, Tensor]]]  # lr scale, and parameters with their gradients

_STATS, _CARRY, _SQUARE = "confidence", "carry", "square"
_CLEAN_STEPS = "clean_steps"  # in a group whose confidence function warms up


class SignOptimizer(Optimizer):
    """Base of the optimizers that step along signs or ballots.

    A subclass says in `_average_names` which averages it keeps per parameter and in `_move` how they and the step
    follow from the direction `d`. The step itself, for all of them, is

    `p = (1 - lr * weight_decay) * p - lr * lr_scale * move`,

    where `lr_scale` is the vote state's, or the warm-up of the group's confidence function, or 1.

    1. Every gradient of every group is searched for NaN and infinities. Where there is one, nothing moves: no
       parameter, no average, no statistics, no decay. CPU tensors are judged on the host; elsewhere a flag on the
       device gates every factor, and the host never waits.
    2. `d = sign(grad)`, or the ballots of `grad` where the group has a confidence. With `decoupled=False`
       `weight_decay * p` is added to the gradient before the ballots are cast. A confidence that requires a carry finds
       it, and where it wants them the squares, in the parameter's state: `carry` and `square`, float32. It warms up
       over the group's clean steps.
    3. The subclass updates its averages and returns the move. Averages are float32 for half-precision parameters:
       with `beta = 0.999` an average of +-1 kept in bfloat16 would stop at half of its limit.
    4. Half-precision parameters are updated in float32 and rounded once. A step below half the spacing of their numbers
       is still lost: keep float32 parameters and autocast where that matters.

    Decay is not scaled by `lr_scale`: the scale makes up for verdicts that are more frequent during a warm-up, and
    decay happens once a step whatever the verdicts do.

    A copy of the optimizer (`copy.deepcopy`, pickle) belongs to other parameters and so leaves the vote state behind.
    A checkpoint holds numbers, words and tensors only: of the confidence function its `repr`, which must be that of the
    optimizer that loads it.
    """

    _vote_state: VoteState | None = None  # on the class, since copies of an optimizer do not run __init__

    def __init__(self, params: ParamsT, defaults: Group, vote_state: VoteState | None) -> None:
        check_vote_state(self._label, vote_state)
        self._vote_state = vote_state
        super().__init__(params, defaults)

    # What a subclass says ------------------------------------------------------------------------------------------

    @abstractmethod
    def _average_names(self, group: Group) -> tuple[str, ...]:
        """Return the keys in `self.state[p]` of the averages that the group's options call for."""

    @abstractmethod
    def _move(self, group: Group, d: list[Tensor], averages: list[list[Tensor]], ok: Tensor | None) -> list[Tensor]:
        """Update the averages in place and return what is subtracted from the parameters, in units of the rate.

        Args:
            group: the options.
            d: directions, in the dtype of the averages. Not to be changed.
            averages: one list like `d` for each of `_average_names(group)`.
            ok: None, or a flag on the device: where it is false the averages must stay as they are.
        """

    def _check_options(self, group: Group) -> None:
        """Raise a `ValueError` about the first option of `group` that cannot be used; subclasses add their own."""
        check_lr(self._label, group["lr"])
        check_number(self._label, "weight_decay", group["weight_decay"], "a step takes lr * weight_decay * p off p")
        for name in ("decoupled", "maximize"):
            check_flag(self._label, name, group[name])
        check_confidence(self._label, group["confidence"], l2=self._adds_l2(group), voted=self._vote_state is not None)

    def _adds_l2(self, group: Group) -> bool:
        """Return whether weight decay is added to the raw gradient, not taken off the parameter."""
        return not group["decoupled"]

    def _averages_gradients(self, group: Group) -> bool:
        """Return whether `d` is the gradient itself, for an algorithm that takes the sign after the average."""
        del group
        return False

    # Parameters ----------------------------------------------------------------------------------------------------

    @property
    def _label(self) -> str:
        return type(self).__name__

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters with options of its own; those it leaves out are the optimizer's.

        Raises:
            ValueError: if an option is out of range, a parameter is not a dense tensor of float16, bfloat16, float32 or
                float64, or the optimizer has a vote state and the parameters no names. The optimizer is then unchanged.
        """
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
            check_params(self._label, self.param_groups[-1], named=self._vote_state is not None)
            if self._vote_state is not None:
                self._vote_state.track(
                    chain.from_iterable(zip(g["param_names"], g["params"], strict=True) for g in self.param_groups)
                )
        except ValueError:
            del self.param_groups[-1]
            raise

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return options, averages and statistics as plain values and tensors, which `weights_only` loading accepts."""

        # As a hook, so that it runs before the user's own hooks.
        def put_into_words(_: Optimizer, state_dict: dict[str, Any]) -> None:
            for group in state_dict["param_groups"]:
                group["confidence"] = name_confidence(group["confidence"])

        handle = self.register_state_dict_post_hook(put_into_words, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of what `state_dict` returned; options are the saved ones, the confidence function stays.

        Raises:
            ValueError: if groups, options, shapes or confidence functions are not those of this optimizer and its
                parameters. The optimizer is then unchanged.
        """
        saved_state: dict[Tensor, dict[str, Tensor]] = {}
        confidences: list[Confidence | None] = [group["confidence"] for group in self.param_groups]

        # torch casts all floating-point state to the parameter's dtype, which would round float32 averages and float64
        # statistics of half-precision parameters. So the saved tensors are kept aside: after the user's hooks that may
        # change what is loaded, and put in place before those that look at the result.
        def keep_aside(_: Optimizer, state_dict: dict[str, Any]) -> None:
            saved_state.update(self._saved_state(state_dict))

        def put_in_place(_: Optimizer) -> None:
            for group, confidence in zip(self.param_groups, confidences, strict=True):
                group["confidence"] = confidence
            for p, entries in saved_state.items():
                self.state[p] = {name: _own_copy(p, name, value) for name, value in entries.items()}

        handles = (
            self.register_load_state_dict_pre_hook(keep_aside),
            self.register_load_state_dict_post_hook(put_in_place, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _saved_state(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """Check what is about to be loaded, and return its state by parameter."""
        state: dict[Tensor, dict[str, Tensor]] = {}
        options = self.defaults.keys() - {"differentiable"}  # torch adds it to copies
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(
                f"{self._label}: the checkpoint has groups of {[len(g['params']) for g in saved_groups]} parameters, "
                f"this optimizer of {[len(g['params']) for g in self.param_groups]}: it belongs to another model or "
                "other param groups"
            )
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            missing = sorted(options - saved.keys())
            if missing:
                raise ValueError(
                    f"{self._label}: the checkpoint has no option {missing[0]!r}: it was saved by another optimizer; "
                    f"load it with that one"
                )
            mine = name_confidence(group["confidence"])
            if saved["confidence"] != mine:
                raise ValueError(
                    f"{self._label}: the checkpoint was written with confidence={saved['confidence']}, this optimizer "
                    f"has {mine}, to which the other's memory means nothing: build it with the checkpoint's"
                )
            self._check_options({**saved, "confidence": group["confidence"]})
            for index, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
                entries = state_dict["state"].get(key)
                if not entries:
                    continue
                confidence = group["confidence"]
                expected = dict.fromkeys((*self._average_names(saved), *_carried(confidence)), tuple(p.shape))
                if confidence is not None and confidence.num_stats:
                    expected[_STATS] = (confidence.num_stats,)
                came = {name: tuple(value.shape) for name, value in entries.items()}
                if came != expected:
                    raise ValueError(
                        f"{self._label}: the checkpoint has {came} for {describe(group, index)}, expected {expected}: "
                        "it was saved by another optimizer or for another model"
                    )
                state[p] = entries
        return state

    # The step ------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the parameters once, or leave everything as it is where a gradient holds a NaN or an infinity.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What `closure` returned, else None.

        Raises:
            ValueError: if a gradient is sparse. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Whatever may raise comes first, for all groups, so that an error leaves nothing half done.
        work = [(group, batch) for group in self.param_groups for batch in self._batches(group)]
        grads = [grad for _, (_, pairs) in work for _, grad in pairs]
        ok: dict[torch.device, Tensor] = {}
        sparse: dict[Tensor, Signs] = {}
        if not self._host_decides(grads):
            ok = finite_on_devices(grads)
        else:
            sparse = self._sparse_signs(work)
            dense = [grad for _, (_, pairs) in work for p, grad in pairs if p not in sparse]
            if not (all(signs.finite for signs in sparse.values()) and finite_on_host(dense)):
                return loss
        for group, (scale, pairs) in work:
            for p, _ in pairs:
                if p in sparse:
                    self._drop_stale(group, p)
                    rate = float(on_host(group["lr"]) * scale)
                    sparse[p].step(p, -rate if group["maximize"] else rate)
            rest = [pair for pair in pairs if pair[0] not in sparse]
            if rest:
                self._step_batch(group, scale, rest, ok.get(pairs[0][0].device))
        for group in {id(group): group for group, _ in work}.values():
            self._count_step(group, next(iter(ok.values()), None))
        return loss

    def _sparse_signs(self, work: list[tuple[Group, _Batch]]) -> dict[Tensor, Signs]:
        """Return the signs of the gradients along which, and along nothing else, their parameters are to move."""
        found: dict[Tensor, Signs] = {}
        if self._vote_state is None:
            return found
        for group, (_, pairs) in work:
            if not (self._average_names(group) or group["weight_decay"]):
                signs = {p: signs_of(p, grad) for p, grad in pairs}
                found |= {p: each for p, each in signs.items() if each is not None}
        return found

    @staticmethod
    def _host_decides(grads: list[Tensor]) -> bool:
        """Return whether looking at the gradients makes the host wait for no device."""
        return all(grad.device.type == "cpu" for grad in grads)

    def _batches(self, group: Group) -> list[_Batch]:
        """Return the group's parameters that have gradients, one learning rate, device and dtype a batch."""
        batches: dict[tuple[object, ...], _Batch] = {}
        warm_ups: dict[torch.device, Scalar] = {}  # one a device, so that its parameters share a batch
        for index, p in enumerate(group["params"]):
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.layout != torch.strided:
                raise ValueError(
                    f"{self._label}: gradients must be dense, got {p.grad.layout} for {describe(group, index)}: "
                    "build nn.Embedding with sparse=False, or give this parameter to another optimizer"
                )
            if self._vote_state is not None:
                scale = on_host(self._vote_state.lr_scale(p))
            else:
                if p.device not in warm_ups:
                    warm_ups[p.device] = _warm_up(group, p.device)
                scale = warm_ups[p.device]
            key = (p.device, p.dtype, id(scale) if isinstance(scale, Tensor) else scale)
            batches.setdefault(key, (scale, []))[1].append((p, p.grad))
        return list(batches.values())

    def _step_batch(self, group: Group, scale: Scalar, pairs: list[tuple[Tensor, Tensor]], ok: Tensor | None) -> None:
        device, dtype = pairs[0][0].device, wide_dtype(pairs[0][0].dtype)
        lr = on_host(group["lr"])
        rate = gated(lr * scale, ok, 0.0, dtype, device)
        keep = None
        if group["weight_decay"] and not self._adds_l2(group):
            keep = gated(1.0 - lr * group["weight_decay"], ok, 1.0, dtype, device)
        for params, sources, *averages in tiles(self._rows(group, scale, pairs, ok), tile_limit(device)):
            wide = [p.to(dtype) for p in params]
            move = self._move(group, self._directions(group, sources, dtype), averages, ok)
            if keep is not None:
                scale_(wide, keep)
            add_(wide, move, -rate)
            if wide[0] is not params[0]:
                torch._foreach_copy_(params, wide)

    def _rows(
        self, group: Group, scale: Scalar, pairs: list[tuple[Tensor, Tensor]], ok: Tensor | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield each parameter with what its direction is made of, and its averages."""
        names, carried = self._average_names(group), _carried(group["confidence"])
        for p, grad in pairs:
            self._drop_stale(group, p)
            state = self.state[p] if p in self.state or names or group["confidence"] is not None else {}
            for name in (*names, *carried):
                if name not in state:
                    state[name] = torch.zeros_like(p, dtype=_dtype(name, p), memory_format=torch.preserve_format)
            source = grad if group["confidence"] is None else self._ballots(group, scale, p, grad, ok)
            yield (p, source, *(state[name] for name in names))

    def _drop_stale(self, group: Group, p: Tensor) -> None:
        """Drop averages that the group no longer has: a momentum that was set to 0 and is set again starts afresh."""
        if p in self.state:
            kept = {*self._average_names(group), *_carried(group["confidence"]), _STATS}
            for stale in self.state[p].keys() - kept:
                del self.state[p][stale]

    def _ballots(self, group: Group, factor: Scalar, p: Tensor, grad: Tensor, ok: Tensor | None) -> Tensor:
        """Return the ballots of a gradient, and keep what its confidence remembers; `factor` is on the threshold."""
        confidence: Confidence = group["confidence"]
        if self._adds_l2(group) and group["weight_decay"]:
            # In float32, since the sum of two finite halves need not be a finite half.
            raw = -grad if group["maximize"] else grad
            grad = raw.to(wide_dtype(grad.dtype)).add(p, alpha=group["weight_decay"])
        state = self.state[p]
        stats = state.get(_STATS)
        if stats is None:
            stats = confidence.init_stats(1, p.device)[0]
        new: dict[str, Tensor] = {}
        if confidence.requires_carry:
            kept = Kept(stats, state[_CARRY], state.get(_SQUARE))
            ballots, kept = cast_with_carry(confidence, grad, kept, factor)
            new = {_STATS: kept.stats, _CARRY: kept.carry}
            if kept.square is not None:
                new[_SQUARE] = kept.square
        else:
            ballots, new[_STATS] = cast_ballots(confidence, grad, stats, factor)
        if not confidence.num_stats:
            del new[_STATS]
        if ok is not None:
            # The gradient of a step that is to be skipped may have made anything of them.
            ballots = torch.where(ok, ballots, 0.0)
            old = {_STATS: stats, **state}
            new = {name: torch.where(ok, value, old[name]) for name, value in new.items()}
        state.update(new)
        return ballots

    def _count_step(self, group: Group, ok: Tensor | None) -> None:
        """Count a step that was clean, on the device where `ok` lies, if the group's confidence warms up."""
        if group["confidence"] is None or len(group["confidence"].warm_up(budgeted=False)[0]) == 1:
            return
        steps = group.get(_CLEAN_STEPS, 0)
        if ok is not None:
            if not isinstance(steps, Tensor):
                steps = torch.full((), steps, dtype=torch.int64, device=ok.device)
            steps = steps.to(ok.device, non_blocking=True)
        group[_CLEAN_STEPS] = steps + (1 if ok is None else ok)

    def _directions(self, group: Group, sources: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return `d`: what the parameters should move against, with `maximize` already counted in."""
        d = [source.to(dtype) for source in sources]
        if group["confidence"] is None and not self._averages_gradients(group):
            d = list(torch._foreach_sign(d))
        # With L2 the ballots were cast on `weight_decay * p - grad`, where the sign is turned already.
        turned = group["confidence"] is not None and self._adds_l2(group) and group["weight_decay"]
        return list(torch._foreach_neg(d)) if group["maximize"] and not turned else d


def _carried(confidence: Confidence | None) -> tuple[str, ...]:
    """Return the keys in `self.state[p]` of what a confidence function has kept of each component."""
    if confidence is None or not confidence.requires_carry:
        return ()
    return (_CARRY,) if confidence.square_decay is None else (_CARRY, _SQUARE)


def _warm_up(group: Group, device: torch.device) -> Scalar:
    """Return the factor on a group's thresholds and learning rate in this step; a tensor if only the device knows."""
    if group["confidence"] is None:
        return 1.0
    factors: tuple[float, ...] = group["confidence"].warm_up(budgeted=False)[0]
    steps: int | Tensor = group.get(_CLEAN_STEPS, 0)
    last = len(factors) - 1
    if not isinstance(steps, Tensor):
        return factors[min(steps, last)]
    at = steps.to(device, non_blocking=True).clamp(max=last)
    # Not `[at]`, which would wait for the device to tell the index.
    return on_host(torch.tensor(factors, dtype=torch.float64).to(device, non_blocking=True).take(at))


def _dtype(name: str, p: Tensor) -> torch.dtype:
    """Return the dtype in which the optimizer keeps an entry of a parameter's state."""
    if name == _STATS:
        return torch.float64
    return torch.float32 if name in (_CARRY, _SQUARE) else wide_dtype(p.dtype)


def _own_copy(p: Tensor, name: str, value: Tensor) -> Tensor:
    """Return a loaded tensor in the dtype, device and layout in which the optimizer keeps it, sharing no memory."""
    if name == _STATS:
        return value.to(device=p.device, dtype=_dtype(name, p), copy=True)
    return torch.empty_like(p, dtype=_dtype(name, p), memory_format=torch.preserve_format).copy_(value)

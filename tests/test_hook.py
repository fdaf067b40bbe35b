"""What the hook's state refuses before any rank is asked, and what it warns of."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distsign import (
    AdaptiveConfidence,
    FixedConfidence,
    RMSConfidence,
    SignAdamPP,
    SignVoteState,
    TargetDensity,
    hook,
    sign_vote_hook,
)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"confidence": 0.1}, "confidence must be a confidence function"),
        ({"margin": 0}, "margin must be an integer of at least 1, got 0"),
        ({"margin": 1.5}, "margin must be an integer"),
        ({"exchange": "ring"}, "exchange must be one of two_phase, all_gather, hierarchical, got 'ring'"),
        ({"wire": "ternary"}, "wire must be one of auto, planes, sparse, got 'ternary'"),
        ({"l2": -1.0}, "l2 must be a number of at least 0"),
        ({"carry": "yes"}, "carry must be True, False, torch.float32 or torch.bfloat16, got 'yes'"),
        ({"carry": torch.float16}, "carry must be"),
        ({"owner_carry": "both"}, "owner_carry must be True, False, or one of 'plain', 'standing', got 'both'"),
        ({"bits_per_param": 0.0}, "bits_per_param must be a number above 0"),
        ({"bits_per_param": 0.05, "carry": False}, "bits_per_param needs carry=True"),
        ({"bits_per_param": 0.05, "owner_carry": False}, "bits_per_param needs owner_carry=True"),
        ({"bits_per_param": 0.05, "wire": "planes"}, "leave wire='planes' out"),
        ({"wire": "sparse"}, "wire='sparse' .* set carry=True"),
        ({"confidence": RMSConfidence(), "carry": False}, "requires a carry"),
        ({"exclude": "norm"}, "exclude must be names of parameters in a list"),
        ({"exclude": [3]}, "exclude must be names of parameters"),
        ({"ranks_per_node": 2}, "ranks_per_node is an option of exchange='hierarchical'"),
        ({"exchange": "hierarchical", "ranks_per_node": 0}, "ranks_per_node must be a number of ranks .* got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SignVoteState(**{"confidence": AdaptiveConfidence(), **options})


def test_a_model_that_is_not_ddp() -> None:
    state = SignVoteState(confidence=AdaptiveConfidence())
    with pytest.raises(TypeError, match="DistributedDataParallel.*got Tensor"):
        sign_vote_hook(state, torch.zeros(3))  # as FSDP calls its hooks


def test_state_dict_needs_names() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        SignVoteState(confidence=AdaptiveConfidence()).state_dict()


def tracked(confidence: Any, model: nn.Module) -> SignVoteState:
    state = SignVoteState(confidence=confidence)
    state.track(model.named_parameters())
    return state


def test_checkpoints_of_something_else_are_refused() -> None:
    saved = tracked(AdaptiveConfidence(), nn.Linear(2, 2)).state_dict()
    with pytest.raises(ValueError, match=r"written with AdaptiveConfidence.*TargetDensity"):
        tracked(TargetDensity(0.1), nn.Linear(2, 2)).load_state_dict(saved)
    with pytest.raises(ValueError, match="format is 7"):
        tracked(AdaptiveConfidence(), nn.Linear(2, 2)).load_state_dict({**saved, "format": 7})
    stranger = {**saved, "voter": {"elsewhere": {"stats": torch.zeros(1)}}}
    with pytest.raises(
        ValueError, match="checkpoint, and not this model, has the parameter 'elsewhere', one of 1 that"
    ):
        tracked(AdaptiveConfidence(), nn.Linear(2, 2)).load_state_dict(stranger)


def test_a_parameter_that_came_later_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    """As one that was frozen at first, or of `add_param_group`."""
    model, saved = nn.Linear(2, 2), tracked(AdaptiveConfidence(), nn.Linear(2, 2, bias=False))
    saved._pipeline.memory.grow([4], torch.device("cpu"))
    saved._pipeline.memory.voter.stats += 0.5
    state = tracked(AdaptiveConfidence(), model)
    with caplog.at_level(logging.WARNING, "distsign"):
        state.load_state_dict(saved.state_dict())
    assert caplog.messages == [
        "this model, and not the checkpoint, has the parameter 'bias', one of 1 whose votes begin anew"
    ]
    weight, bias = state._pipeline.memory.voter.stats
    assert bool((weight == saved._pipeline.memory.voter.stats[0]).all()) and not bool((weight == bias).all())


def test_loading_forgets_what_was_before() -> None:
    model = nn.Linear(2, 2)
    state = tracked(FixedConfidence(), model)
    saved = state.state_dict()
    state._counts.num_steps = 9
    state.load_state_dict(saved)
    assert state.traffic().num_steps == 0


@pytest.mark.parametrize(
    ("confidence", "asks", "expected"),
    [(RMSConfidence(k=8), False, 1), (RMSConfidence(k=8), True, 0), (RMSConfidence(k=8, warmup_steps=0), False, 0)],
)
def test_a_warm_up_that_no_optimizer_knows_of_is_said_once(
    confidence: RMSConfidence, asks: bool, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = nn.Linear(4, 2)
        model = DistributedDataParallel(net)
        state = SignVoteState(confidence=confidence)
        model.register_comm_hook(state, sign_vote_hook)
        optimizer = SignAdamPP(net.named_parameters(), lr=0.1, momentum=0.0, vote_state=state if asks else None)
        with caplog.at_level(logging.WARNING, "distsign"):
            for _ in range(hook.NUM_STEPS_TO_ASK_IN + 3):
                model(torch.ones(3, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert len([text for text in caplog.messages if "vote_state=state" in text]) == expected
        state.close()
    finally:
        dist.destroy_process_group()

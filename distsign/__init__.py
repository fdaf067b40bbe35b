"""distsign: data-parallel training over slow links, by majority vote on confident signs.

model = DDP(net)
state = SignVoteState(confidence=RMSConfidence(k=8), bits_per_param=0.08, margin=2)
model.register_comm_hook(state, sign_vote_hook)
optimizer = SignAdamPP(model.named_parameters(), lr=0.04, momentum=0.0, vote_state=state)
"""

from distsign.confidence import AdaptiveConfidence, Confidence, FixedConfidence, RMSConfidence, TargetDensity
from distsign.hook import SignVoteState, sign_vote_hook
from distsign.optim import SignAdam, SignAdamPP, SignSGD, Signum
from distsign.registry import VoteError
from distsign.replicas import ReplicaCheck, ReplicaError
from distsign.resharding import reshard
from distsign.traffic import Traffic

__all__ = [
    "AdaptiveConfidence",
    "Confidence",
    "FixedConfidence",
    "RMSConfidence",
    "ReplicaCheck",
    "ReplicaError",
    "SignAdam",
    "SignAdamPP",
    "SignSGD",
    "SignVoteState",
    "Signum",
    "TargetDensity",
    "Traffic",
    "VoteError",
    "reshard",
    "sign_vote_hook",
]
__version__ = "0.1.0"

"""What liars can do to a vote: attacks, a vote of many workers in one process, and rivals to hold it against.

`Electorate` is the vote itself (voters, owners, payloads and checks of the library, and no link between them);
`Averages` are rules that combine gradients without a vote. `train` takes either. SECURITY.md has what is guaranteed.
"""

from distsign.robustness.attacks import (
    ATTACKS,
    Adaptive,
    AllVotes,
    Attack,
    Collusion,
    Honest,
    LyingOwners,
    Malformed,
    PoisonFlood,
    RandomBallots,
    SignFlip,
    StaleRepeats,
    Targeted,
    View,
)
from distsign.robustness.averages import RULES, Averages, coordinate_median, mean, trimmed_mean
from distsign.robustness.electorate import Combined, Electorate
from distsign.robustness.training import Outcome, train

__all__ = [
    "ATTACKS",
    "RULES",
    "Adaptive",
    "AllVotes",
    "Attack",
    "Averages",
    "Collusion",
    "Combined",
    "Electorate",
    "Honest",
    "LyingOwners",
    "Malformed",
    "Outcome",
    "PoisonFlood",
    "RandomBallots",
    "SignFlip",
    "StaleRepeats",
    "Targeted",
    "View",
    "coordinate_median",
    "mean",
    "train",
    "trimmed_mean",
]

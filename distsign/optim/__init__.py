"""Optimizers that step along signs or confident ballots, with or without a vote.

All of them take `d = sign(grad)`, so that clipping or unscaling a verdict does not change the step; `d` is the ballots
of the raw gradient where a `confidence` is given. That is for one worker: the optimizer then keeps what the confidence
remembers, the carry among it. Under a vote `SignVoteState` does.

| optimizer | averages | step, before `lr * weight_decay * p` is taken off |
|---|---|---|
| `SignAdam` | `m = b1*m + (1-b1)*d`, `v = b2*v + (1-b2)*d*d` | `p -= lr * m / (sqrt(v) + eps)` |
| `SignAdamPP` | `m = momentum*m + (1-momentum)*d` | `p -= lr * m` |
| `SignSGD` | none | `p -= lr * d` |
| `Signum` | `m = momentum*m + (1-momentum)*grad` | `p -= lr * sign(m)` |
"""

from distsign.optim.sign_adam import SignAdam, SignAdamPP
from distsign.optim.sign_sgd import SignSGD, Signum

__all__ = ["SignAdam", "SignAdamPP", "SignSGD", "Signum"]

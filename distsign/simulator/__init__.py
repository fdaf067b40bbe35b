"""What a cluster would do: bytes, time and scale of a scheme before anything is rented. See `simulate`.

`python -m distsign simulate` is the same as a command, and `distsign calibrate` measures what it needs to know of a
machine.
"""

from distsign.simulator.cluster import Cluster, Link
from distsign.simulator.models import Model, load_model
from distsign.simulator.predict import Prediction, Step, break_even, simulate
from distsign.simulator.profile import Profile
from distsign.simulator.schemes import Scheme

__all__ = [
    "Cluster",
    "Link",
    "Model",
    "Prediction",
    "Profile",
    "Scheme",
    "Step",
    "break_even",
    "load_model",
    "simulate",
]

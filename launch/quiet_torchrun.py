"""torchrun for a program that answers Ctrl-C itself: a signal ends the ranks without torchrun's stack of its own.

Ctrl-C reaches every process of the terminal. Here it is left to the one that started this one, which then sends
SIGTERM; the ranks get that from torchrun.
"""

from __future__ import annotations

import logging
import os
import signal
import sys


def main() -> None:
    """Run torchrun on this process's arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It warns of each signal, once for each process. Some of its loggers look at the variable, some at their parent.
    os.environ.setdefault("LOGLEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(os.environ["LOGLEVEL"])
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--signals-to-handle", "SIGTERM,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()

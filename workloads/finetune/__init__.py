"""The fine-tuning program: one validated file in, an adapter or a model out, and an exit code that a Job can act on.

FINISHED: the result is whole where the configuration wants it.
FAILED: something that a retry might cure (the network, a full disk, another trainer on the same run).
REFUSED: a configuration, data or a model that will be refused again, or memory that will run out again: no retry.
INTERRUPTED: stopped by a signal after a checkpoint: start it again and it goes on.

At the top it needs `planner.errors` and pydantic alone, so that data are checked before any framework is loaded.
"""

FINISHED = 0
FAILED = 1
REFUSED = 2
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later

"""The one exception that a user sees: a sentence that says what is wrong and what to do, and an exit code."""

DOES_NOT_FIT = 1
BAD_INPUT = 2
REALITY_DIFFERS = 3


class PlannerError(Exception):
    """A refusal. `str(error)` is one sentence with the next step; the CLI prints it and exits with `exit_code`."""

    exit_code = BAD_INPUT


class UnknownArchitecture(PlannerError):
    """The shape of this model is not known here, and a guess would be a wrong number."""


class NotModelled(PlannerError):
    """What was asked is understood, but no formula here covers it."""


class DoesNotFit(PlannerError):
    """Nothing that was allowed holds the workload, or it costs more than was approved."""

    exit_code = DOES_NOT_FIT

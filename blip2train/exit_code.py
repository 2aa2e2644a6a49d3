"""How a process says to its launcher and scheduler why it left."""

DONE = 0
CRASHED = 1
"""An error that is not the user's: Python's own code for an exception nobody caught."""
USER_ERROR = 2
REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong with the run; started again, it continues from its last checkpoint."""
INTERRUPTED = 130
"""What shells give for Ctrl-C."""

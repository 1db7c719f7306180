"""The one exception for input that a person can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message names the field or file, its value, and what would be valid.

    Commands print the message without a traceback and exit with status 2.
    """


class Interrupted(KeyboardInterrupt):
    """Stopped by SIGINT, after saving what there was to save."""


class Preempted(Interrupted):
    """The same by SIGTERM, which schedulers send before they take a machine away, or SIGHUP."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown `name`: the nearest known names, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"valid names: {', '.join(known)}"

"""Exceptions for input that the user can correct, and for signals that stop a run."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """Invalid input. The message names the field or file, its value, and what would be valid.

    Commands print the message without a traceback and exit with status 2.
    """


class Interrupted(KeyboardInterrupt):
    """Stopped by SIGINT, after a last checkpoint if there was progress to save."""


class Preempted(Interrupted):
    """Stopped by SIGTERM, which schedulers send before they reclaim a machine, or SIGHUP."""


def of_extra(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module that an extra of this package installs.

    Raises:
      UserError: it cannot be imported; `what` needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        install = f"python -m pip install -e '.[{extra}]'"
        raise UserError(f"{what} needs {module.partition('.')[0]}: {install}") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint for an unknown `name`: up to three similar known names, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"valid names: {', '.join(known)}"

"""Commands, `python -m experiments.<name>`, and the rooms of what they share; README.md is the map."""

import os
import sys

from mobilellm_jax.training import malloc, signals

if sys.argv[:1] == ["-m"]:  # Python is about to run a command, which imports jax for seconds before it begins
    malloc.keep_freed_memory()  # before there is a second thread
    signals.watch()
elif signals.PARENT in os.environ:  # a process of a sweep, which imports it too
    malloc.keep_freed_memory()
    signals.end_with_parent()

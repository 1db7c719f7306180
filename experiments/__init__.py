"""The acts: train, sweep, figures. Every module here is a command, `python -m experiments.<name>`."""

import sys

from mobilellm_jax import malloc, signals

if sys.argv[:1] == ["-m"]:  # Python is about to run a command, which imports jax for seconds before it begins
    malloc.keep_freed_memory()  # before there is a second thread
    signals.watch()

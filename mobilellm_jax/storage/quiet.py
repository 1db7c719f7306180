"""Settings of the storage libraries: unsafe defaults, and log output that repeats their errors.

Nothing is set on import. `cli.run` and the processes of a sweep call `settings`; `files.path_of` calls
`buckets`, without which reads of a bucket that several processes write to are stale.
"""

import functools
import logging
import os
import sys

import fsspec.config
from absl import logging as absl_logging


def settings() -> None:
    """Applies all settings of this module."""
    buckets()
    checkpoints()


@functools.cache
def buckets() -> None:
    # gcsfs would cache the first listing of a folder for ever; other processes write there, too.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    # It would query the kind of bucket at every call.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # It logs pages of traceback for each error that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


@functools.cache
def checkpoints() -> None:
    # Orbax logs every save at INFO, and pages of traceback for each error that it raises.
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
    # It closes its event loop at the first error of a save; asyncio logs the others, which nobody awaits.
    logging.getLogger("asyncio").addFilter(lambda record: "/orbax/" not in record.getMessage())
    # Threads of tensorstore that are still writing then print that the loop is closed.
    say = sys.unraisablehook
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else say(args)

"""Settings of the libraries below storage: wrong defaults, and what they print besides their errors.

Nothing is set on import. `cli.run` and the processes of a sweep call `settings`; `files.path_of` calls
`buckets`, without which a bucket that several processes write to is read wrongly.
"""

import functools
import logging
import os
import sys

import fsspec.config
from absl import logging as absl_logging


def settings() -> None:
    """All of them."""
    buckets()
    checkpoints()


@functools.cache
def buckets() -> None:
    # gcsfs would keep the first listing of a folder for ever; others write there, too.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    # It would ask for the kind of bucket at every call.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # It logs pages of traceback for each error that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


@functools.cache
def checkpoints() -> None:
    # Orbax logs every save at INFO, and pages of traceback for each error that it raises.
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
    # It ends its event loop at the first error of a save; asyncio logs the other ones, which nobody awaits.
    logging.getLogger("asyncio").addFilter(lambda record: "/orbax/" not in record.getMessage())
    # The threads of tensorstore that still write then print that the loop is closed.
    say = sys.unraisablehook
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else say(args)

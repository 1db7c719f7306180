"""The flags of commands that run as several processes, one for each host: the same command on every host.

  python -m experiments.train --distributed --workdir=/shared/runs/first                 # finds its cluster
  python -m experiments.train --coordinator_address=host0:1234 --num_processes=2 --process_id=0 --workdir=...

`--workdir` is one directory that all hosts see. Only process 0 writes there, and says what is going on.
"""

import os
import re
import shlex
import sys

from absl import flags

from experiments import cli
from mobilellm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_bool(
        "distributed", False, "several processes; found on Cloud TPU and GKE, and under Slurm and Open MPI"
    )
    flags.DEFINE_string(
        "coordinator_address", None, "host:port of process 0, where there is no cluster to ask"
    )
    flags.DEFINE_integer("num_processes", None, "how many processes there are", 1)
    flags.DEFINE_integer("process_id", None, "which of the processes this is, from 0", 0)
    flags.DEFINE_float("start_timeout", 60, "seconds to wait for the other processes", 1)


def asked() -> bool:
    """Whether the flags ask for several processes."""
    one = (FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    return FLAGS.distributed or any(value is not None for value in one)


def start() -> None:
    """Joins the other processes, if the flags ask for it; comes before the first use of devices.

    Raises:
      UserError: the flags do not fit together, or no cluster was found.
    """
    address, count, index = FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    given = [value is not None for value in (address, count, index)]
    if not asked():
        return
    import jax  # here, as --list and --status do without

    from mobilellm_jax.parallel import processes

    if any(given) and not all(given):
        raise UserError("--coordinator_address, --num_processes, --process_id: give all three, or none")
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(f"--coordinator_address={address}: expected host:port, such as 10.0.0.2:1234")
    if count is not None and index is not None and index >= count:
        raise UserError(f"--process_id={index}: expected 0 to {count - 1}, as --num_processes={count}")
    advice = "Run the same command on every host, or allow more time with --start_timeout=<seconds>. "
    if all(given):
        advice += "Each has a --process_id of its own"
    else:
        advice += (
            "On a TPU slice:\n  gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all "
            f"--command={shlex.quote(cli.command())}"
        )
    processes.start(address, count, index, FLAGS.start_timeout, advice)
    if jax.process_index() > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

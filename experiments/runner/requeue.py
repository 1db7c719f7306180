"""A command as a task of submitit: it saves, and is started again, when the scheduler wants the machine.

Slurm says so with the signal that submitit asks it for, USR2: some time before the time limit is over and,
where the cluster is set up so, before preemption. The command gets SIGTERM for it, and its exit status
`RESUME_ME` has submitit put the task into the queue again. SIGTERM from outside, which is what `scancel`
sends, is passed on too, but then the task stays ended.
"""

import os
import signal
import subprocess
from collections.abc import Sequence

from submitit.core.job_environment import JobEnvironment
from submitit.helpers import DelayedSubmission

from mobilellm_jax.training.signals import RESUME_ME


class Command:
    """What submitit pickles, and calls in the task: strings only."""

    def __init__(self, arguments: Sequence[str]):
        """Takes the command; it runs in the directory that is the current one here."""
        self.arguments, self.directory = list(arguments), os.getcwd()

    def __call__(self) -> None:
        """Runs the command to its end.

        Raises:
          subprocess.CalledProcessError: its exit status is not 0.
          SystemExit: it is to be started again.
        """
        wanted_back = JobEnvironment._usr_sig()
        requeue = signal.getsignal(wanted_back)  # submitit's; it calls `checkpoint`, and ends this process
        received: list[int] = []
        process: subprocess.Popen | None = None

        def stop(number: int, _: object) -> None:
            received.append(number)
            if process:
                process.terminate()

        for number in (wanted_back, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        # In a session of its own: Slurm signals a whole process group, and USR2 would end the command.
        process = subprocess.Popen(self.arguments, cwd=self.directory, start_new_session=True)
        if received:
            process.terminate()
        status = process.wait()
        saved = status in (RESUME_ME, -signal.SIGTERM)  # the latter while it was still starting
        if saved and (wanted_back in received or not received) and callable(requeue):
            requeue(wanted_back, None)
        if status:
            raise subprocess.CalledProcessError(status, self.arguments)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs when the task starts again: the same command, which resumes by itself."""
        return DelayedSubmission(self)

"""Where the metrics of a run go besides `metrics.jsonl`: TensorBoard events, Weights & Biases, trackio.

Each writer gets every number under the same name, such as "train/loss". The last two are services: an error
of theirs is said once, and ends the writer but not the training.
"""

import contextlib
import importlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath, is_bucket, reason, write_atomically
from mobilellm_jax.storage.sealed import parse, seal, unseal

ID = "writers.json"  # in a run directory: the id of the run for services
PROJECT = "mobilellm_jax"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
_SERVICES = ("wandb", "trackio")  # both the name and the package
_END_S = 60.0  # seconds that a service may take to send what is left


def names_of(writers: str) -> list[str]:
    """Splits the field `train.writers`."""
    return [name for name in writers.split(",") if name]


def check(writers: str) -> None:
    """Imports the packages of the services in `train.writers`; UserError for one that is not installed."""
    for name in names_of(writers):
        if name in _SERVICES:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise UserError(
                    f"train.writers: {name!r} needs a package that cannot be imported ({error}): "
                    f"python -m pip install -e '.[{name}]'"
                ) from None


class TensorBoard:
    """Events in a local directory. All methods raise OSError where it cannot be written."""

    def __init__(self, directory: AnyPath, start_step: int):
        # Here and not above: half a second that only runs need.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore  (made by the import)

        directory.mkdir(exist_ok=True)
        # Not SummaryWriter, which hangs for ever once its thread meets a full disk.
        self._events = EventsWriter(str(directory / "events"))
        restart = SessionLog(status=SessionLog.START)  # TensorBoard drops the events of later steps
        self._events.write_event(Event(step=start_step + 1, session_log=restart))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
        from tensorboardX.summary import scalar

        for name, value in values.items():
            summary = scalar(name, value)
            self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Service:
    """A run of W&B or trackio, which have the same three calls: init, log and finish."""

    def __init__(
        self,
        name: str,
        workdir: AnyPath,
        run_id: str,
        config: Mapping[str, Any],
        warn: Callable[[str], object],
    ):
        self._name, self._warn, self._run = name, warn, None
        more: dict[str, Any] = {}
        if name == "wandb":
            more = {"id": run_id} if is_bucket(workdir) else {"id": run_id, "dir": str(workdir)}
        with self._tolerant():
            self._run = importlib.import_module(name).init(
                project=os.environ.get(f"{name.upper()}_PROJECT", PROJECT),
                name=f"{workdir.name}-{run_id}",  # trackio knows a run by its name
                config=dict(config),
                resume="allow",
                **more,
            )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None:
            with self._tolerant():
                # W&B drops steps up to the last one it has: after a resume, the same numbers once more.
                self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Does nothing: services send in the background."""

    def close(self) -> None:
        """Waits until all is sent, for at most `_END_S`."""
        run, self._run = self._run, None
        if run is None:
            return

        def finish() -> None:
            with self._tolerant():
                run.finish()

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(_END_S)
        if thread.is_alive():
            self._warn(
                f"warning: {self._name} has not sent everything after {_END_S:.0f} s, and is left behind"
            )

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # networks, accounts and the packages themselves have no type in common
            self._run = None
            self._warn(
                f"warning: {self._name} failed ({reason(error)}); the run continues without it, and "
                "metrics.jsonl has all metrics"
            )


Writer = TensorBoard | Service


def open_writers(
    writers: Sequence[str],
    workdir: AnyPath,
    start_step: int,
    config: Mapping[str, Any],
    warn: Callable[[str], object],
) -> list[Writer]:
    """Opens writers for a run that starts or resumes after `start_step`.

    Args:
      config: the config of the run, which services show.
      warn: receives the error of a service.

    Raises:
      OSError, UserError: `workdir` cannot be written.
    """
    opened: list[Writer] = []
    for name in writers:
        if name in _SERVICES:
            opened.append(Service(name, workdir, _id(workdir, start_step), config, warn))
        elif not is_bucket(workdir):
            opened.append(TensorBoard(workdir / "tensorboard", start_step))
    return opened


def _id(workdir: AnyPath, start_step: int) -> str:
    """The id of the run in `workdir`: a new one for a run that starts, so that old curves do not mix in."""
    path = workdir / ID
    if start_step:
        with contextlib.suppress(OSError, ValueError):
            return str(unseal(parse(path.read_bytes()))["id"])
    run_id = uuid.uuid4().hex[:8]
    write_atomically(path, (json.dumps(seal({"id": run_id})) + "\n").encode())
    return run_id

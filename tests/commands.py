"""Runs `python -m <module>` in a fork of a process that has imported the libraries already.

Imports take 5 s of CPU time, most commands that a test runs take less. A template process, one for each
worker of pytest, imports the libraries (none of this project, no JAX backend) and forks for each command.
The fork has its own process id, arguments, working directory, environment, streams and exit status, and
ends as any interpreter does.

What differs from a real process: `sys.modules` holds all LIBRARIES, so a test of what a command imports needs
a real one; all forks share one hash seed; a traceback begins with a frame of "<string>"; the parent process
is not the test. Variables that an interpreter or a library reads before the fork (`_READ_EARLY`) are refused
where they differ; options of jax are set from theirs.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import inspect
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIBRARIES = """
absl.app flax.linen fsspec grain jax.experimental.compilation_cache.compilation_cache jaxtyping
jax.experimental.multihost_utils matplotlib.backends.backend_agg matplotlib.figure ml_collections.config_flags
optax.contrib orbax.checkpoint pandas safetensors.numpy scipy.stats sentencepiece tensorboardX.summary
tensorboardX.event_file_writer tokenizers tqdm yaml
"""
_STREAMS = ("p2cread", "c2pwrite", "errwrite")  # the names that `subprocess` has for the child's 0, 1, 2
# The libraries of mathematics and memory, and jax where it is no option, look only once.
_READ_EARLY = "PYTHON(?!PATH$)|LANG|LC_|LD_|GLIBC_|MALLOC_|OPENBLAS_|OMP_|MKL_|MPL|JAX_(?!COORDINATOR_)"
_MESSAGE = 1 << 20  # bytes, more than the kernel lets through


def command(
    module: str,
    *flags: str,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python -m module *flags` to its end; see `start`."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with start(module, *flags, env=env, cwd=cwd, stdin=stdin) as process:
        try:
            output, errors = process.communicate(input)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def real(module: str, *flags: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As `command`, by a new interpreter: for one test of each command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    line = [sys.executable, "-m", module, *flags]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def start(
    module: str, *flags: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT, **options: Any
) -> subprocess.Popen[str]:
    """Starts `python -m module *flags`; `env` is put over the environment of the test.

    `options` are stdin (nothing, if not given), stdout and stderr (pipes, if not given) and
    start_new_session, as in `subprocess.Popen`.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    unknown = options.keys() - {*pipes, "start_new_session"}
    assert not unknown, f"a fork cannot have {unknown}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    line = [sys.executable, "-m", module, *flags]
    return _Forked(line, env=environment, cwd=cwd, **{**pipes, **options})


class _Forked(subprocess.Popen):
    """A process that the template forks and reaps; all but its start and its status are as in `Popen`."""

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *args, **kwargs).arguments
        request = {
            "arguments": given["args"],
            "environment": given["env"],
            "directory": os.path.abspath(given["cwd"]),
            "is_session": bool(given["start_new_session"]),
        }
        streams = [given[name] if given[name] != -1 else number for number, name in enumerate(_STREAMS)]
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            socket.send_fds(_template(), [json.dumps(request).encode()], [*streams, other.fileno()])
        answer = json.loads(self._channel.recv(_MESSAGE) or '{"refused": "the template has died"}')
        if "refused" in answer:
            self._channel.close()
            raise ValueError(f"cannot fork {' '.join(given['args'])}: {answer['refused']}")
        self.pid, self._child_created = answer["pid"], True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*[given[name] for name in ends])

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            status = self._channel.recv(_MESSAGE)
            # Until now its id is taken, as that of any child is until it is waited for.
            self._channel.shutdown(socket.SHUT_WR)
            self._channel.recv(1)
            self._channel.close()
            self.returncode = int(status)  # fails if the keeper was killed
        return self.returncode

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(timeout=0)
        return self.returncode


@functools.cache
def _template() -> socket.socket:
    """A connection to the template; it ends when the connection is closed, however the test ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("JAX_") and name != "PYTHONPATH"
    }
    # Leaves no names in the main module, in which the command will run.
    program = '__import__("runpy")._run_module_as_main(__import__("commands").serve())'
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(theirs.fileno())],
            cwd=Path(__file__).parent,
            env=environment,
            pass_fds=[theirs.fileno()],
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        )
    if not ours.recv(_MESSAGE):
        raise RuntimeError(f"the template of commands did not start:\n{process.communicate()[1].decode()}")

    def end() -> None:
        ours.close()
        process.communicate()

    atexit.register(end)
    return ours


# What follows runs in the template.


def serve() -> str:
    """Answers requests for ever; in each fork, which has taken on what was asked for, returns its module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the test, which may have other plans
    control = socket.socket(fileno=int(sys.argv[1]))
    early = dict(os.environ)
    for library in LIBRARIES.split():
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # no fork has to look through, and so to copy, what is there
    control.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _MESSAGE, len(_STREAMS) + 1)
        with contextlib.suppress(ChildProcessError):  # there are none
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    control.close()
    *streams, number = descriptors
    channel = socket.socket(fileno=number)
    if child := os.fork():
        _keep(child, channel, streams)
    try:
        request = json.loads(message)
        _become(request, streams, early)
    except BaseException as error:
        channel.send(json.dumps({"refused": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    channel.send(json.dumps({"pid": os.getpid()}).encode())
    channel.close()
    return request["arguments"][2]


def _keep(child: int, channel: socket.socket, streams: list[int]) -> None:
    """Reports the status of the child, and reaps it as soon as the test has read that."""
    try:
        for stream in streams:
            os.close(stream)
        end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        with contextlib.suppress(OSError):  # the test is gone
            channel.send(str(status).encode())
            channel.recv(1)
        os.waitpid(child, 0)
    finally:
        os._exit(0)


def _become(request: dict[str, Any], streams: list[int], early: dict[str, str]) -> None:
    """Makes this process what `python -m module` is before the module runs."""
    environment = request["environment"]
    _, _, _, *flags = request["arguments"]
    import jax._src.config as jax_config
    import numpy as np

    options = {name.upper(): kind for name, (kind, _, _) in jax_config.config.meta.items()}
    for name in sorted({*environment, *early} - options.keys()):
        if re.match(_READ_EARLY, name) and environment.get(name) != early.get(name):
            raise ValueError(f"{name}={environment.get(name)}: is read before the fork; start a real process")
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    if request["is_session"]:
        os.setsid()
    os.chdir(request["directory"])
    by_imports = {name: value for name, value in os.environ.items() if early.get(name) != value}
    os.environ.clear()
    os.environ.update({**by_imports, **environment})
    for name in environment.keys() & options.keys():
        parse = {bool: lambda _, name=name: jax_config.bool_env(name, False), int: int, float: float}
        jax_config.config.update(name.lower(), parse.get(options[name], str)(environment[name]))
    path = environment.get("PYTHONPATH", "")
    folders = [os.path.abspath(folder) for folder in path.split(os.pathsep)] if path else []
    sys.path[:] = [os.getcwd(), *folders, *sys.path[1:]]
    sys.argv = ["-m", *flags]
    sys.orig_argv = request["arguments"]
    importlib.import_module("multiprocessing.process").ORIGINAL_DIR = os.getcwd()
    np.random.seed()  # noqa: NPY002, as when it is imported
    signal.signal(signal.SIGINT, signal.default_int_handler)

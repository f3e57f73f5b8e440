"""Starts Python programs without the time needed to import TensorFlow.

A server process imports TensorFlow and the project once and forks for each program. It creates no
TensorFlow runtime, which would not survive a fork. The fork returns from `Server.serve` and runs
the program at the top level of the interpreter, so that it ends like any Python process: exit code,
traceback, `atexit`. When no client is connected, the server kills the programs that it started and
exits.

Programs share the server's interpreter start: import order, hash seed, locale, HOME and thread
settings. Tests of these start a new Python process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import FileLock
from PIL import Image

import research
from research.models import residual
from research.runs import pictures
from research.system.environment import import_tensorflow

ROOT = Path(__file__).resolve().parents[1]
MAX_MESSAGE = 2**20  # bytes
START_TIMEOUT = 120.0  # seconds
# Environment variable: SmallResNet has one block in each stage. A short run takes most of its time
# to trace the network.
THIN_NETWORKS = "THIN_NETWORKS"
# These import TFDS, which reads TFDS_DATA_DIR at import.
READ_ENVIRONMENT_AT_IMPORT = (
    "research.data.built_in.digits",
    "research.data.built_in.sketches",
    "research.data.tfds_source",
)


class Program:
    """A started program in its own process group, with the interface of `subprocess.Popen`.

    Args:
      arguments: the program's arguments.
      connection: to the server, which sends the process id and, at the end, the exit code.
    """

    def __init__(self, arguments: Sequence[str], connection: socket.socket) -> None:
        self.args = arguments
        self._connection = connection
        self.pid = self._receive()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code; the negative signal number if killed; None if still running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code; raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._receive()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to all processes of the group, if the program is running."""
        if self.poll() is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kills all processes of the group."""
        self.send_signal(signal.SIGKILL)

    def _receive(self) -> int:
        message = self._connection.recv(MAX_MESSAGE)
        if not message:
            raise ConnectionError("the launcher's server has ended")
        return int(message)


class Launcher:
    """A client of the server; starts a server if none is running.

    Args:
      folder: shared by all clients of the server, such as the folder of a test session.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "launcher"
        with FileLock(f"{file}.lock"):
            try:
                self._address = file.read_text()
                self._connection = self._connect()  # stays open to keep the server alive
            except OSError:
                self._address = _start_server()
                self._connection = self._connect()
                file.write_text(self._address)

    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        stdout: IO[Any],
        stderr: IO[Any],
        file_size_limit: int | None = None,
    ) -> Program:
        """Starts a program.

        Args:
          arguments: the command line after `python`: a script, or `-m` and a module, followed by
            the program's arguments.
          folder: the working directory.
          environment: all environment variables of the program.
          stdout: file for its standard output.
          stderr: file for its standard error.
          file_size_limit: maximum size of each file that it writes, in bytes; None for no limit.
        """
        request = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "environment": dict(environment),
            "file_size_limit": file_size_limit,
        }
        connection = self._connect()
        message = json.dumps(request).encode()
        socket.send_fds(connection, [message], [stdout.fileno(), stderr.fileno()])
        return Program(arguments, connection)

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        file_size_limit: int | None = None,
        timeout: float = 240.0,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end; returns its exit code and output. See `start` for arguments.

        Raises:
          subprocess.TimeoutExpired: the program was killed after `timeout` seconds.
        """
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            program = self.start(arguments, folder, environment, stdout, stderr, file_size_limit)
            try:
                code = program.wait(timeout)
            finally:
                program.kill()
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(self._address)
        except OSError:
            connection.close()
            raise
        return connection


def _start_server() -> str:
    """Starts a server in its own session, so that Ctrl-C does not end it; returns its address.

    The server may outlive this process. `Popen` would warn about that, so it is not used.
    """
    address = str(Path(tempfile.mkdtemp(prefix="launcher-"), "socket"))
    command = [sys.executable, "-m", "tests.launcher", address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    null_files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
    ]
    pid = os.posix_spawn(sys.executable, command, environment, file_actions=null_files, setsid=True)
    deadline = time.monotonic() + START_TIMEOUT
    while not os.path.exists(address):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended or time.monotonic() > deadline:
            raise RuntimeError(f"the launcher's server did not start (wait status {status})")
        time.sleep(0.01)
    return address


class Server:
    """Forks a process for each request until no client is connected.

    Args:
      address: path of the socket to listen on; its folder is removed at the end.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"{address}.new")
        self._listener.listen(socket.SOMAXCONN)
        os.rename(f"{address}.new", address)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: set[socket.socket] = set()
        # The process id of each client, and the descriptor that becomes readable when it ends.
        self._running: dict[socket.socket, tuple[int, int]] = {}

    def serve(self) -> list[str] | None:
        """Serves until no client is connected.

        Returns:
          In a fork: the arguments of the program to run. In the server: None.
        """
        while True:
            for key, _ in self._selector.select():
                source: Any = key.fileobj
                if source is self._listener:
                    client, _ = source.accept()
                    self._clients.add(client)
                    self._selector.register(client, selectors.EVENT_READ)
                elif source not in self._clients:
                    if key.data in self._running:  # its client may have just disconnected
                        self._tell_end(key.data)
                elif request := _receive_request(source):
                    arguments = self._fork(source, *request)
                    if arguments is not None:
                        return arguments
                else:
                    self._forget(source)
            if not self._clients:
                shutil.rmtree(Path(self._address).parent)
                return None

    def _fork(
        self, client: socket.socket, message: bytes, files: Sequence[int]
    ) -> list[str] | None:
        pid = os.fork()
        if pid == 0:
            self._close()
            return _become(json.loads(message), files)
        with contextlib.suppress(OSError):  # the fork has already done this, or has ended
            os.setpgid(pid, pid)
        for file in files:
            os.close(file)
        end = os.pidfd_open(pid)
        self._running[client] = pid, end
        self._selector.register(end, selectors.EVENT_READ, client)
        client.send(str(pid).encode())
        return None

    def _tell_end(self, client: socket.socket) -> None:
        pid, end = self._running.pop(client)
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(end)
        os.close(end)
        with contextlib.suppress(OSError):  # the client may have disconnected
            client.send(str(os.waitstatus_to_exitcode(status)).encode())

    def _forget(self, client: socket.socket) -> None:
        if client in self._running:
            os.killpg(self._running[client][0], signal.SIGKILL)
            self._tell_end(client)
        self._selector.unregister(client)
        self._clients.remove(client)
        client.close()

    def _close(self) -> None:
        """Closes the server's files in a fork."""
        for _, end in self._running.values():
            os.close(end)
        for connection in (self._listener, *self._clients):
            connection.close()
        self._selector.close()


def _receive_request(client: socket.socket) -> tuple[bytes, list[int]] | None:
    """Returns a request and its file descriptors; None if the client has disconnected."""
    try:
        message, files, _, _ = socket.recv_fds(client, MAX_MESSAGE, 2)
    except ConnectionResetError:  # the client disconnected without reading its messages
        return None
    return (message, files) if message else None


def _become(request: dict[str, Any], files: Sequence[int]) -> list[str]:
    """Gives a fork its own group, files, environment and limits; returns its arguments."""
    os.setpgid(0, 0)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # the environment may specify another
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit := request["file_size_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return request["arguments"]


def import_everything() -> None:
    """Imports TensorFlow and the project, except modules that read the environment at import."""
    import_tensorflow()
    for module in pkgutil.walk_packages(research.__path__, "research."):
        if module.name.endswith(".__main__"):
            continue
        if module.name not in READ_ENVIRONMENT_AT_IMPORT:
            importlib.import_module(module.name)
    # These import more modules on first use.
    Image.init()
    pictures.png(pictures.history([]))
    # Without this, the first garbage collection of each fork would scan and copy all modules.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Runs the server; in each fork, runs a program as Python itself would."""
    import_everything()
    arguments = Server(sys.argv[1]).serve()
    if arguments is None:
        return
    try:
        run(arguments)
    except SystemExit as end:
        if end.code:
            raise
    # Ends a successful program as Python would, but without the deletion of all modules, which
    # takes a quarter of a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # Python reports it at its regular end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def run(arguments: Sequence[str]) -> None:
    """Runs a script or, after `-m`, a module."""
    if THIN_NETWORKS in os.environ:
        residual.BLOCKS_PER_STAGE = 1
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.modules.pop(arguments[1], None)  # it may be imported already
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()

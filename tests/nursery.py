"""Processes that need not import torch: a process that has imported it forks them.

A kernel, or a `lagm` of its own, takes half a second to do what a test asks and four to start, and the tests start
hundreds. What is forked is a process like any other, with a number, folder, environment, session and signals of its
own; only its libraries are there already. Where it matters that nothing is (tests/test_cli.py, test_kill.py,
test_wheel.py and all that measures memory or asks what is imported) the tests start Python itself.

tests/conftest.py sends the kernels of the tests' own process here. Run as a program this file is the nursery: it
listens at the socket that is named in its first argument, until its standard input ends.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "torch._dynamo", "torchvision", "matplotlib.pyplot", "ipykernel.ipkernel", "papermill", "scipy",
             "lagm.experiments.running", "lagm.experiments.stages", "lagm.training.lagm")
ADDRESS = ""  # of the nursery, where it is known; a test's process starts one when it first needs it


def can_fork(command: Sequence[str]) -> bool:
    """Whether a command is this Python with code or a module, for which the nursery can do."""
    return sys.platform == "linux" and str(command[0]) == sys.executable and command[1] in ("-c", "-m")


def address() -> str:
    """The nursery's socket; starts it if need be, until this process ends."""
    global ADDRESS
    if not ADDRESS:
        folder = tempfile.TemporaryDirectory(prefix="nursery-")
        path = os.path.join(folder.name, "socket")
        process = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        process.stdout.readline()
        atexit.register(folder.cleanup)
        atexit.register(process.communicate)  # closes its input, and waits
        ADDRESS = path
    return ADDRESS


class Process:
    """A process of the nursery, with what tests and jupyter_client use of `subprocess.Popen`."""

    stdin = None

    def __init__(self, command: Sequence[Any], stdout: Any = None, stderr: Any = None,
                 env: Mapping[str, str] | None = None, cwd: str | Path | None = None, **_: Any):
        self.args, self.returncode = [str(word) for word in command], None
        order = {"command": self.args, "environment": dict(os.environ if env is None else env),
                 "folder": os.path.abspath(cwd or ".")}
        with contextlib.ExitStack() as stack:
            line = stack.enter_context(socket.socket(socket.AF_UNIX))
            nothing = stack.enter_context(open(os.devnull, "r+"))
            self.stdout, out = self._end_of(stack, nothing, 1 if stdout is None else stdout)
            self.stderr, err = (None, out) if stderr == subprocess.STDOUT else self._end_of(
                stack, nothing, 2 if stderr is None else stderr)
            line.connect(address())
            ends = [end if isinstance(end, int) else end.fileno() for end in (nothing, out, err)]
            socket.send_fds(line, [b"!"], ends)
            line.sendall(json.dumps(order).encode() + b"\n")
            self._line = line.makefile("rb")
            self._end = os.dup(line.fileno())
        self.pid = int(self._line.readline())

    @staticmethod
    def _end_of(stack: contextlib.ExitStack, nothing: Any, asked: Any) -> tuple[Any, Any]:
        """What this process reads, and where the other writes."""
        if asked == subprocess.DEVNULL: return None, nothing
        if asked != subprocess.PIPE: return None, asked
        reads, writes = os.pipe()
        stack.callback(os.close, writes)
        return open(reads), writes

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """All that it writes, until its end; a few lines to each, or it would wait for a reader."""
        self.wait(timeout)
        said = [file and file.read() for file in (self.stdout, self.stderr)]
        for file in filter(None, (self.stdout, self.stderr)): file.close()
        return said[0], said[1]

    def poll(self) -> int | None:
        """The exit code, if there is one."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code."""
        if self._wait(timeout) is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as there:
                there.register(self._end, selectors.EVENT_READ)
                if there.select(timeout):
                    self.returncode = int(self._line.readline() or -signal.SIGKILL)  # or the nursery is gone
                    self._line.close(), os.close(self._end)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As the system's, to a process that is there."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError): os.kill(self.pid, number)

    def terminate(self) -> None: self.send_signal(signal.SIGTERM)

    def kill(self) -> None: self.send_signal(signal.SIGKILL)


def start(command: Sequence[str], **options: Any) -> Any:
    """A process, forked if it can be."""
    return (Process if can_fork(command) else subprocess.Popen)(command, **options)


def run(command: Sequence[str], timeout: float = 300, **options: Any) -> "subprocess.CompletedProcess[str]":
    """`subprocess.run` with what it writes as text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(command, stdout=out, stderr=err, **options)
        try: code = process.wait(timeout)
        finally: process.kill()
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess(command, code, *said)


def launch_kernel(cmd: Sequence[str], **options: Any) -> Any:
    """Instead of jupyter_client's, which gives the kernel a session of its own, too."""
    if can_fork(cmd): return Process(cmd, **options)
    from jupyter_client.launcher import launch_kernel
    return launch_kernel(cmd, **options)


# ---- the nursery itself


def become(order: Mapping[str, Any], ends: Sequence[int]) -> None:
    """Make the environment, folder, files and path of this process, a fork, those that were asked for."""
    for number, end in enumerate(ends): os.dup2(end, number)
    os.environ.clear()
    os.environ.update(order["environment"], JPY_PARENT_PID=str(os.getppid()))
    os.chdir(order["folder"])
    added = order["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in added if path and path not in sys.path]
    if "numpy" in sys.modules: sys.modules["numpy"].random.seed()


def execute(option: str, what: str, *words: str) -> None:
    """Do what Python does with `-m MODULE WORDS` or `-c CODE WORDS`."""
    import runpy
    if option == "-c":
        sys.argv, sys.path[:0] = ["-c", *words], [""]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = [what, *words]
    if what != "ipykernel_launcher": sys.path.insert(0, os.getcwd())
    runpy.run_module(what, run_name="__main__", alter_sys=True)


def serve(listener: socket.socket) -> tuple[Mapping[str, Any], list[int]] | None:
    """Fork a process for each order; returns in the fork, with its order and files, and in the nursery at its end."""
    lines: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    events = selectors.DefaultSelector()
    for event in (listener.fileno(), woken, 0): events.register(event, selectors.EVENT_READ)
    while True:
        ready = {key.fd for key, _ in events.select()}
        if 0 in ready: return None
        if woken in ready:
            os.read(woken, 4096)
            for pid in [*lines]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended: continue
                with lines.pop(pid) as line, contextlib.suppress(OSError):
                    line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        if listener.fileno() not in ready: continue
        line = listener.accept()[0]
        _, ends, _, _ = socket.recv_fds(line, 1, 3)
        with line.makefile("rb") as asked: order = json.loads(asked.readline())
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            line.sendall(b"%d\n" % os.getpid())
            for other in (line, listener, events, *lines.values()): other.close()
            return order, ends
        lines[pid] = line
        for end in ends: os.close(end)


def main() -> None:
    """Import, listen, and in each fork do what was asked."""
    global ADDRESS
    ADDRESS = sys.argv[1]
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel has it; nothing is drawn yet
    del sys.path[0]
    for name in LIBRARIES:
        with contextlib.suppress(ImportError): importlib.import_module(name)
    import jupyter_client.provisioning.local_provisioner as provisioner
    provisioner.launch_kernel = launch_kernel
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(ADDRESS)
    listener.listen(64)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    given = serve(listener)
    if given is None: return
    become(*given)
    execute(*given[0]["command"][1:])


if __name__ == "__main__": main()

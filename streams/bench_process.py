"""Run a function in a process of its own, and be told how it gets on."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from wakesleep.streams.stopping import Stopped, StopSignals, leave_at_signals

POLL = 0.2  # seconds between two looks at the signals
KILLED = "its process was killed: more memory than is free?"


class Failed(RuntimeError):
    """The function came to no result; the text says why."""


class Processes:
    """Processes that begin with the same modules loaded, and nothing else.

    On Linux they are forked from one that has loaded them and done nothing, so that each starts at
    once and holds the same memory; elsewhere they load them anew.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        forks = sys.platform == "linux"
        self._context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(list(modules))
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for us
            forkserver.ensure_running()
            signal.signal(signal.SIGINT, before)

    def run(self, function: Callable[..., Any], *arguments: Any, told: Callable[[str], None]):
        """Return function(*arguments, told), called in a process of its own.

        Args:
            told: called here with each text that the function passes to its own `told`.

        Raises:
            Failed: it raised, or its process ended; Stopped: a signal came, and it was ended.
        """
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_serve, args=(theirs, function, arguments))
        with StopSignals() as stop:
            try:
                process.start()
                theirs.close()
                return _result(ours, told, stop)
            except EOFError:
                if stop.number is not None:  # Ctrl-C reaches both processes
                    raise Stopped(stop.number) from None
                raise Failed(KILLED) from None
            finally:
                if process.pid is not None:
                    process.kill()
                    process.join()
                ours.close()


def _result(pipe: Connection, told: Callable[[str], None], stop: StopSignals) -> Any:
    while True:
        while not pipe.poll(POLL):
            if stop.number is not None:
                raise Stopped(stop.number)
        kind, value = pipe.recv()
        match kind:
            case "told":
                told(value)
            case "result":
                return value
            case "failed":
                raise Failed(value)


def _serve(pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    leave_at_signals()
    try:
        result = function(*arguments, lambda text: pipe.send(("told", text)))
    except BrokenPipeError:
        return  # whoever waited is no more
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        pipe.send(("failed", f"{type(error).__name__}: {first}"))
    else:
        pipe.send(("result", result))

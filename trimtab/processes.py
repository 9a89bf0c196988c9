"""Several processes as one run: how long they wait for one another, and what is said when one of them is gone.

A process may rightly wait for hours: the first one prepares the data or asks a judge while the others stand at the next
collective call. So the timeout of the process group cannot tell a dead process from a busy one; it is long, and threads of
each process watch the others:

* a process is gone when another one on its machine no longer finds it (at once, and never because it is busy);
* a machine is gone when none of its processes has been heard of for :data:`SILENCE` seconds;
* a process that fails says so before it ends.

What is found goes through the store that the launcher keeps, and every process ends with one message and a code other than
0 within a minute, also one that is stuck in a collective call.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed

from trimtab.errors import TrimtabError

WAIT = timedelta(days=1)  # for one another; a judge may take long, and what is gone is noticed by other means
EVERY = 2.0  # seconds between two looks
SILENCE = 40.0  # seconds without a word from a machine
GRACE = 5.0  # seconds in which a process may end by itself when another one has failed: it often meets the same error
KILLED = "is gone: it was killed, or it crashed (a system out of memory kills, too)"
_runs = itertools.count()  # of this process: each has its own keys in the store


class Peers:
    """The other processes of a run, watched until :meth:`leave`.

    Args:
        store: shared by all of them; used from threads, so nobody else may wait on this client of it.
        rank, world: which process this is, of how many.
        place: the machine (and its numbering of processes) that this process is on.
        last: what to do when others are gone, with the message; then the process ends.
    """

    def __init__(
        self, store: Any, rank: int, world: int, place: str, last: Callable[[str, int], None] | None = None
    ) -> None:
        self.store, self.rank, self.world, self.place, self.pid = store, rank, world, place, os.getpid()
        self.last = last or self._end
        self.on_loss: Callable[[str], str] = lambda text: ""  # hears what happened and says what to do now
        self.verdict: dict[str, Any] | None = None
        self._over = threading.Event()
        self._others: dict[int, dict[str, Any]] = {}  # rank -> place and process id, of those that have said so
        self._heard: dict[str, tuple[int, float]] = {}  # machine -> its counter, and when it last moved
        self._contact = time.monotonic()

    def start(self) -> Peers:
        """Begin to watch; a request to end (SIGTERM, which a launcher sends when one process has died) is explained, too."""
        self.store.set(f"who/{self.rank}", json.dumps({"place": self.place, "pid": self.pid}))
        self._own, self._wake = socket.socketpair()
        for end in (self._own, self._wake):
            end.setblocking(False)
        self._before: tuple[Any, int] | None = None
        first = threading.current_thread() is threading.main_thread()
        if first and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # the byte is written by the signal itself: a main thread in a collective call would never get to a handler
            taken = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGTERM, lambda *_: None), taken
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._decide)]
        for thread in self._threads:
            thread.start()
        return self

    def leave(self) -> None:
        """This process is done: that it ends is no loss."""
        with suppress(RuntimeError):  # of the store, which may have gone first
            self.store.set(f"left/{self.rank}", "")
        self._over.set()
        self._wake.send(b"\0")
        for thread in self._threads:
            thread.join(EVERY)
        if self._before:
            signal.signal(signal.SIGTERM, self._before[0])
            signal.set_wakeup_fd(self._before[1])
        for end in (self._own, self._wake):
            end.close()

    def failed(self, error: BaseException) -> None:
        """Tell the others. An error that only says that another process is gone waits here for who it is: no return then."""
        if between_processes(error):
            time.sleep(SILENCE + 3 * EVERY)
        said = str(error).strip().splitlines() or [""]
        self._report(self.rank, f"failed ({type(error).__name__}: {said[0]})")

    # --- two threads: one talks to the store, which may block, the other keeps the time ------------------------------

    def _talk(self) -> None:
        missed: list[int] = []
        pause = EVERY
        while not self._over.is_set() and self.verdict is None:
            try:
                self._look()
                self._contact = time.monotonic()
            except RuntimeError:  # the store is gone, and perhaps who kept it; or all is over, and this thread with it
                missed, before = self._missing(), missed
                for rank in set(missed) & set(before):
                    self._report(rank, KILLED)
                pause = 2 * EVERY  # each try leaves a warning of torch's
            self._over.wait(pause)

    def _missing(self) -> list[int]:
        """Those that should be on this machine."""
        return [r for r, who in self._others.items() if who["place"] == self.place and not alive(who["pid"])]

    def _look(self) -> None:
        store, now = self.store, time.monotonic()
        if store.check(["gone"]):
            self._found(json.loads(store.get("gone")))
            return
        store.add(f"beat/{self.place}", 1)
        for rank in set(range(self.world)) - {self.rank, *self._others}:
            if store.check([f"who/{rank}"]):
                self._others[rank] = json.loads(store.get(f"who/{rank}"))
        for rank in self._missing():
            if not store.check([f"left/{rank}"]):
                self._report(rank, KILLED)
                return
        for place in {who["place"] for who in self._others.values()} - {self.place}:
            count = store.add(f"beat/{place}", 0)
            if (before := self._heard.get(place)) is None or before[0] != count:
                self._heard[place] = count, now
            elif now - before[1] > SILENCE:
                there = [r for r, who in self._others.items() if who["place"] == place]
                there = [r for r in there if not store.check([f"left/{r}"])]
                if there:
                    self._report(there[0], f"has not been heard of for {SILENCE:g} s, nor anything else on its machine")

    def _report(self, rank: int, what: str) -> None:
        """The first report counts, everywhere."""
        who = self._others.get(rank, {"place": self.place, "pid": self.pid})
        said = {"rank": rank, "by": self.rank, "what": what, "host": who["place"].split()[0], "pid": who["pid"]}
        with suppress(RuntimeError):
            said = json.loads(self.store.compare_set("gone", "", json.dumps(said)))
        self._found(said)

    def _found(self, verdict: dict[str, Any]) -> None:
        self.verdict = verdict
        with suppress(OSError):
            self._wake.send(b"\0")

    def _decide(self) -> None:
        told = False
        while not self._over.is_set() and self.verdict is None:
            if select.select([self._own], [], [], EVERY)[0]:
                told = signal.SIGTERM in self._own.recv(64)
            if told:  # most likely because another one is gone: who?
                time.sleep(1.5 * EVERY)
                break
            if time.monotonic() - self._contact > SILENCE:
                what = f"cannot be reached: nothing was heard from its machine for {SILENCE:g} s"
                self.verdict = {"rank": 0, "by": self.rank, "what": what, "host": "", "pid": 0}
        found = self.verdict
        if found is not None and found["what"].startswith("failed"):
            time.sleep(GRACE)
        if self._over.is_set() or (found is not None and found["rank"] == self.rank):
            return
        if found is None:
            self.last(f"this process ({self.rank} of {self.world}) was told to end (SIGTERM).", 128 + signal.SIGTERM)
        else:
            where = f" (pid {found['pid']} on {found['host']})" if found["host"] else ""
            text = (
                f"process {found['rank']} of {self.world}{where} {found['what']}. The others cannot go on without it."
            )
            self.last(text, 2)

    def _end(self, text: str, code: int) -> None:
        """What the main thread is in may never return: the process ends here."""
        again = ""
        with suppress(Exception):
            again = self.on_loss(text)
        here = [r for r, who in self._others.items() if who["place"] == self.place]
        if self.rank < min(set(here) - set(self._missing()), default=self.world):  # one voice on each machine is enough
            print(f"\nerror: {text} {again}".rstrip(), file=sys.stderr, flush=True)
        os._exit(code)


def alive(pid: int) -> bool:
    """Whether there is such a process on this machine; one that is dead and was not yet taken note of is not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # not ours to signal, or a system without /proc
        return True


def between_processes(error: BaseException) -> bool:
    """Whether the error is about what processes tell one another: it then says nothing of its cause."""
    if isinstance(error, TrimtabError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def place() -> str:
    """This machine, and among whose process ids: containers may share a host's name."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


@contextmanager
def together() -> Iterator[Peers | None]:
    """Join the processes that a launcher started, and watch them while this lasts; None where there is only one.

    All of them leave together, where nothing failed.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes == 1:
        yield None
        return
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store, _set_pg_timeout

    _set_pg_timeout(WAIT)
    store: Any = _get_default_store()
    store = store.clone()  # a connection of its own: the other one may be waiting
    store.set_timeout(timedelta(seconds=SILENCE / 2))
    keys = PrefixStore(f"trimtab/{next(_runs)}", store)
    peers = Peers(keys, state.process_index, state.num_processes, place()).start()
    try:
        yield peers
        PartialState().wait_for_everyone()
    except BaseException as e:
        peers.failed(e)
        raise
    peers.leave()

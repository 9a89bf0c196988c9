"""One of several processes dies or fails: a clear error within a minute, and resume ends where an undisturbed run would."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed import PrefixStore, Store, TCPStore

from tests.engine import worst
from tests.reliability.launch import HERE, environment, free_port, launch, run, with_accelerate, with_torchrun
from tests.tiny_folder import feedback_file, workplace
from trimtab import processes
from trimtab.config import resolve
from trimtab.errors import ModelError
from trimtab.processes import Peers, alive, between_processes
from trimtab.run import train

SHARED = {
    "model": "./model", "finetune": "full", "precision": "float64", "batch_size": 4, "samples": 0, "learning_rate": 0.01,
    "threads": 1, "save_every": 2,
}  # fmt: skip
STEPS = {**SHARED, "data": "pairs.jsonl", "method": "dpo", "max_steps": 6}
ROUNDS = {
    **SHARED, "data": "prompts.jsonl", "method": "rloo", "judge": "rule:judge.py:odd", "batch_size": 2, "rounds": 2,
    "prompts_per_round": 5, "answers": 3, "sample_tokens": 6,
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    workplace(tmp_path, monkeypatch)
    feedback_file(tmp_path / "pairs.jsonl", "comparison", 11)
    feedback_file(tmp_path / "prompts.jsonl", "prompt", 11)
    (tmp_path / "judge.py").write_text(
        "import time\n"
        "def odd(prompt, answer):\n    return sum(map(ord, answer)) % 11 / 10\n"
        "def slow(prompt, answer):\n    open('asked', 'w').close()\n    time.sleep(300)\n    return 0.0\n"
    )
    return tmp_path


def words(values: dict[str, Any], output: str) -> list[str]:
    flags = [w for k, v in {**values, "output": output}.items() if k != "data" for w in (f"--{k}", str(v))]
    return ["train", values["data"], *flags]


@pytest.mark.parametrize(
    ("values", "launcher", "moment", "then"),
    [(STEPS, with_torchrun, ("learning", "4@1"), 2), (ROUNDS, with_accelerate, ("answering", "2@1"), 1)],
    ids=["learning, torchrun", "a round, accelerate, resumed by the one that is left"],
)
def test_kill_one_of_two_and_resume(
    values: dict[str, Any], launcher: Callable[[int], list[str]], moment: tuple[str, str], then: int
) -> None:
    alone = train(resolve({**values, "output": "alone"}))
    code, told = run([*launcher(2), str(HERE / "killed.py"), *moment, *words(values, "both")], Path.cwd())
    assert time.time() - float(Path("died").read_text()) < 60
    assert code != 0
    (said,) = re.findall(r"^error: .*$", told, re.MULTILINE)
    wanted = r"error: process 1 of 2 \(pid \d+ on \S+\) is gone: .* go on from checkpoint-(\d+) with --resume --output both\."
    found = re.fullmatch(wanted, said)
    assert found and int(found[1]) == 2, said
    card = json.loads(Path("both/run.json").read_text())
    assert card["status"] == "failed" and card["error"].startswith("process 1 of 2")
    if then == 2:
        launch(2, "late.py", *words(values, "both"), "--resume", cwd=Path.cwd())
    else:
        train(resolve({**values, "output": "both", "resume": True}))
    ours, wanted_weights = (load_file(f / "model.safetensors") for f in (Path("both"), alone))
    assert worst(ours, wanted_weights) < 1e-9


def test_who_waits_for_a_judge_is_not_forgotten() -> None:
    """No launcher cares for these two (as under srun), and the first is in a call of five minutes when the other dies."""
    flags = words({**ROUNDS, "judge": "rule:judge.py:slow"}, "both")
    port, two = str(free_port()), []
    for rank in "01":
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        two.append(
            subprocess.Popen(
                [sys.executable, str(HERE / "late.py"), *flags], env={**environment(Path.cwd()), **ours},
                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            )
        )  # fmt: skip
    try:
        began = time.time()
        while not Path("asked").exists() and time.time() - began < 120 and all(p.poll() is None for p in two):
            time.sleep(0.1)
        assert Path("asked").exists()
        two[1].kill()
        killed = time.time()
        _, told = two[0].communicate(timeout=60)
        assert two[0].returncode == 2 and time.time() - killed < 30
        assert f"process 1 of 2 (pid {two[1].pid} on " in told and "remove both and start again" in told
    finally:
        for p in two:
            p.kill()
            p.communicate()


# --- the watch itself ---------------------------------------------------------------------------------------------------


class Watched:
    """Peers of one process, each with a connection of its own; what they would say at their end is kept."""

    def __init__(self) -> None:
        self.server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
        self.said: dict[int, tuple[str, int]] = {}
        self.peers: list[Peers] = []

    def peer(self, rank: int, place: str = "here 1", pid: int | None = None) -> Peers:
        store: Store = self.server.clone()
        store = PrefixStore("a run", store)
        found = Peers(store, rank, 3, place, lambda text, code: self.said.__setitem__(rank, (text, code)))
        found.pid = found.pid if pid is None else pid
        self.peers.append(found.start())
        return found

    def leave(self, peer: Peers) -> None:
        self.peers.remove(peer)
        peer.leave()

    def wait(self, *ranks: int, seconds: float = 5) -> None:
        end = time.monotonic() + seconds
        while not self.said.keys() >= set(ranks) and time.monotonic() < end:
            time.sleep(0.01)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    for name, seconds in (("EVERY", 0.02), ("SILENCE", 0.5), ("GRACE", 0.1)):
        monkeypatch.setattr(processes, name, seconds)
    found = Watched()
    yield found
    for peer in found.peers:
        peer.leave()


def gone() -> int:
    """A process id that was just given back; dead and not yet taken note of until then."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    end = time.monotonic() + 10
    while alive(done.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(done.pid) and done.returncode is None  # a zombie is not alive
    done.wait()
    return done.pid


def test_a_dead_process_is_found_by_its_neighbour_and_told_to_other_machines(watched: Watched) -> None:
    watched.peer(0, "there 1")
    watched.peer(2)
    watched.peer(1, pid=gone())
    watched.wait(0, 2)
    assert watched.said[0] == watched.said[2]
    assert (
        re.fullmatch(r"process 1 of 3 \(pid \d+ on here\) is gone: .*", watched.said[0][0]) and watched.said[0][1] == 2
    )


def test_the_same_process_number_on_another_machine_is_another_process(watched: Watched) -> None:
    watched.peer(0)
    watched.peer(1, "there 1", pid=gone())  # alive, and heard of: only its number means nothing here
    watched.wait(0, seconds=1)
    assert not watched.said


def test_a_machine_that_falls_silent(watched: Watched) -> None:
    watched.peer(0)
    watched.peer(1, "there 1")._over.set()  # its threads end, and it has not said that it leaves
    watched.wait(0)
    text, code = watched.said[0]
    assert "process 1 of 3" in text and "has not been heard of for 0.5 s" in text and code == 2


def test_who_leaves_is_not_missed(watched: Watched) -> None:
    """First it says so, then its process ends: the other order, however short between, is a process that died."""
    watched.peer(0)
    watched.leave(watched.peer(2, "there 1"))
    with subprocess.Popen(["sleep", "60"]) as living:
        watched.leave(watched.peer(1, pid=living.pid))
        living.kill()
    assert not alive(living.pid)
    watched.wait(0, seconds=1)
    assert not watched.said


def test_an_error_of_one_is_told_to_the_others(watched: Watched) -> None:
    watched.peer(0)
    watched.peer(1, "there 1").failed(ModelError("out of memory (at once)\nand more"))
    watched.wait(0)
    assert (
        "process 1 of 3" in watched.said[0][0] and "failed (ModelError: out of memory (at once))" in watched.said[0][0]
    )
    assert 1 not in watched.said  # it has its own error to show


def test_without_the_store_the_keeper_is_gone(watched: Watched) -> None:
    watched.peer(1)
    watched.peer(2).store.set("who/0", json.dumps({"place": "there 1", "pid": 1}))
    time.sleep(0.2)
    watched.server = None  # type: ignore[assignment]
    watched.wait(1, 2)
    assert "cannot be reached" in watched.said[1][0]


def test_told_to_end(watched: Watched) -> None:
    """A launcher's SIGTERM is answered even where the main thread never gets to a handler, and afterwards all is as before."""
    peer = watched.peer(0)
    os.kill(os.getpid(), signal.SIGTERM)
    watched.wait(0)
    assert watched.said[0] == ("this process (0 of 3) was told to end (SIGTERM).", 143)
    watched.leave(peer)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1


def test_which_errors_say_nothing_of_their_cause() -> None:
    closed = RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:1"
    )
    assert between_processes(closed)
    assert not between_processes(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not between_processes(ModelError("the gloo of the model")) and not between_processes(KeyboardInterrupt())

"""The command line, which dies by kill -9 at a step of its own choosing:  killed.py MOMENT STEP train FILE ...

STEP may be STEP@RANK: of several processes, that one dies. It leaves the time of its death in the file ``died``.

MOMENT: ``learning`` in the middle of optimiser step STEP, ``saving`` while checkpoint STEP is half written, ``deleting``
when checkpoint STEP is written and the first file of an older one is gone, ``sampling`` and ``judging`` when round STEP has
kept a first part of its answers, or of its judgements, and is about to keep the second; ``answering`` when it is about to
sample for round STEP.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from trimtab import cli
from trimtab.online.kept import Kept
from trimtab.online.rounds import Rounds
from trimtab.update.trainer import Update

moment, (number, _, rank) = sys.argv[1], sys.argv[2].partition("@")
step = int(number) if rank == os.environ.get("RANK", "") else -1


def die(*_: Any, **__: Any) -> None:
    Path("died").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def before(method: Any, now: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if now(self):
            die()
        return method(self, *args, **kwargs)

    return wrapped


match moment:
    case "learning":
        Update._record = before(Update._record, lambda t: t.model.training and t.state.global_step + 1 == step)
    case "sampling":
        here = lambda k: k.folder.name == f"{step:04d}" and k.drawn()  # noqa: E731
        Kept.add_drawn = before(Kept.add_drawn, here)
    case "answering":
        Rounds._answers = before(Rounds._answers, lambda r: r.current + 1 == step)
    case "judging":
        here = lambda k: k.folder.name == f"{step:04d}" and k.judged()  # noqa: E731
        Kept.add_judged = before(Kept.add_judged, here)
    case "saving":
        save = Update._save_optimizer_and_scheduler
        Update._save_optimizer_and_scheduler = before(save, lambda t: t.state.global_step == step)
    case "deleting":
        rmtree = shutil.rmtree

        def half(folder: Any, *args: Any, **kwargs: Any) -> None:
            if os.path.basename(folder).startswith("checkpoint-"):
                os.remove(os.path.join(folder, "trainer_state.json"))
                die()
            rmtree(folder, *args, **kwargs)

        shutil.rmtree = half
sys.argv = [sys.argv[0], *sys.argv[3:]]
cli.main()

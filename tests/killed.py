"""What test_replay kills: an engine with a journal, in one child process after another, each forked from this one.

Prints how many were killed; the last child finishes what is left.
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))

from test_replay import killed_requests
from tiny import engine

LIVES = 20


def live(folder):
    """Submits what is not there yet, goes on with the rest, and waits until all is done."""
    with engine(journal=folder) as made:
        jobs = made.resume()
        known = {one.id for one in made._keeping.journal.jobs()}
        names = {f"job {i}": request for i, request in enumerate(killed_requests())}
        jobs += [made.submit(request, id=name) for name, request in names.items() if name not in known]
        for job in jobs:
            job.result()


def child_of(folder, moment=None):
    """Lives in a process of its own until it is done, or killed at a moment; returns how it ended."""
    child = os.fork()
    if not child:
        if moment is not None:
            threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
        live(folder)
        if moment is not None:
            signal.pause()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(folder):
    """One life after another."""
    began = time.monotonic()
    assert child_of(f"{folder}/unbroken") == 0
    longest = time.monotonic() - began  # so that they end all over a life, on any machine
    moments = random.Random(3)
    killed = sum(child_of(folder, moments.uniform(0.05, 0.6) * longest) == signal.SIGKILL for _ in range(LIVES))
    assert child_of(folder) == 0
    print(killed)


if __name__ == "__main__":
    main(sys.argv[1])

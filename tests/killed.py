"""What test_replay kills: an engine with a journal, in one child process after another, each forked from this one.

Each dies some milliseconds after it has handed a random number of scores to its journal, few at a time; then it hands
over no more, so that enough is left for the others however fast the machine is. The last one finishes what is left.
Prints how many were killed, in how many lives searches went on from scores, and with how many in the last one.
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
from tiny import PATIENCE, engine

from rollflow import journaling

journaling.PACE = 0.001  # or what a fast machine does meanwhile would come at once
LIVES, MOST = 20, 60  # scores of a life: fewer in all than the searches have


def live(folder, scores, pause):
    """Submits what is not there yet, goes on with the rest, and dies; or without a number of scores ends it all."""
    with engine(journal=folder) as made:
        journal = made._keeping.journal
        if scores is not None:
            log, left = journal.log, [scores]

            def counted(id, start, replay):
                log(id, start, replay)
                left[0] -= len(replay.entries)
                if left[0] <= 0:
                    threading.Timer(pause, os.kill, (os.getpid(), signal.SIGKILL)).start()
                    threading.Event().wait()

            journal.log = counted
        jobs = made.resume()
        known = {one.id for one in journal.jobs()}
        names = {f"job {i}": request for i, request in enumerate(killed_requests())}
        jobs += [made.submit(request, id=name) for name, request in names.items() if name not in known]
        while not all(job.resumed is not None for job in jobs):
            time.sleep(0.001)
        report(folder, sum(job.resumed for job in jobs))
        for job in jobs:
            job.result(PATIENCE)
        if scores is not None and left[0] > 0:
            os._exit(1)  # the searches ended with fewer scores than that
        if scores is not None:
            signal.pause()


def report(folder, resumed):
    """Adds a line to what the lives say."""
    with open(f"{folder}/lives", "a") as file:
        file.write(f"{resumed}\n")


def child_of(folder, scores=None, pause=0.0):
    """A life in a process of its own; returns how it ended."""
    child = os.fork()
    if not child:
        live(folder, scores, pause)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(folder):
    """One life after another."""
    moments = random.Random(3)
    lives = [(moments.randrange(1, MOST), moments.uniform(0, 0.05)) for _ in range(LIVES)]
    killed = sum(child_of(folder, *life) == signal.SIGKILL for life in lives)
    assert child_of(folder) == 0
    resumed = [int(line) for line in Path(folder, "lives").read_text().split()]
    print(killed, sum(count > 0 for count in resumed), resumed[-1])


if __name__ == "__main__":
    main(sys.argv[1])

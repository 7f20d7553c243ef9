"""Workers on a Ray cluster: one actor is killed, and its searches go on elsewhere."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ALONE = ["unshare", "-rn"]  # Ray takes another address of the machine for 127.0.0.1 where there is one


def able():
    """Whether a process can have a network of its own here."""
    found = shutil.which("unshare") and shutil.which("ip")
    return bool(found) and not subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install 'rollflow[ray]')")
@pytest.mark.skipif(not able(), reason="there is no unshare, or no right to a network of one's own")
def test_kill_9_of_an_actor_loses_nothing(tmp_path):
    """It takes about 20 seconds, most of them Ray's start and the import of torch in the actor."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    command = f"ip link set lo up && exec {sys.executable} {here / 'ray_workers.py'}"
    found = subprocess.run(
        [*ALONE, "sh", "-c", command],
        env={**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert found.returncode == 0 and " 0 lost" in found.stdout, found.stdout[-2000:] + found.stderr[-4000:]

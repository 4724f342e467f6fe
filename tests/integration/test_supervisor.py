"""The supervisor of workers where things go wrong from the start: it says so, gives up, or takes its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.mark.parametrize(
    ("setting", "message", "code"),
    [
        ({"EMBSTORE_DEVICE": "cuda"}, "workers is 2 and device is cuda: one process owns the GPU", 2),
        ({"EMBSTORE_API_KEYS_FILE": "/nowhere/keys"}, "no worker could start", 1),
    ],
    ids=["cuda", "keys"],
)
def test_settings_that_cannot_work_end_the_server(
    tmp_path: Path, setting: dict[str, str], message: str, code: int
) -> None:
    """A mistake in the settings is said and ends everything; nothing is tried again."""
    environment = os.environ | {"EMBSTORE_WORKERS": "2"} | setting
    command = [sys.executable, "-m", "embstore", "serve", "--store", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("worker started") in (0, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


SUPERVISED = """
import os, signal, socket, sys, threading, time
from server.process.supervisor import Supervisor

def work(member):
    print("start", member.number, flush=True)
    if member.number == 1:
        return 3
    member.listening()
    while True:
        time.sleep(0.1)

listener = socket.create_server(("127.0.0.1", 0))
supervisor = Supervisor(work, [listener], 2, stop_seconds=5)
if sys.argv[1] == "thread":
    threading.Thread(target=time.sleep, args=(60,), name="other", daemon=True).start()
sys.exit(supervisor.run())
"""


def test_a_worker_that_keeps_dying_is_replaced_ever_later() -> None:
    """One that ends at its start is tried a few times in three seconds, not hundreds; the others work on."""
    command = [sys.executable, "-c", SUPERVISED, "plain"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            time.sleep(3)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert output.count("start 0") == 1
    assert 3 <= output.count("start 1") <= 7, output


def test_a_supervisor_with_threads_forks_nobody() -> None:
    """A fork would copy locks that a thread holds: it is refused, by name."""
    command = [sys.executable, "-c", SUPERVISED, "thread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "may have no other thread when it forks; there are MainThread, other" in done.stderr

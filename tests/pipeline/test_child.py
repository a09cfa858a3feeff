"""The process of a training: an installed command that ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from autossl.pipeline import child
from autossl.pipeline.engine import child_words


def test_it_runs_an_installed_command() -> None:
    reading, writing = os.pipe()
    words = child_words(reading, ["autossl"])
    done = subprocess.run(words, pass_fds=(reading,), capture_output=True, text=True, check=False)
    os.close(writing)
    os.close(reading)
    assert done.returncode == 0, done.stderr
    assert "autossl_train" in done.stdout


def test_it_gets_sigterm_when_the_pipe_closes() -> None:
    reading, writing = os.pipe()
    code = (
        f"import runpy, sys, threading, time\nwatch = runpy.run_path({child.__file__!r})['end_with_parent']\n"
        f"threading.Thread(target=watch, args=({reading},), daemon=True).start()\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-SE", "-c", code], pass_fds=(reading,))
    os.close(reading)
    time.sleep(0.2)
    assert process.poll() is None
    os.close(writing)
    assert process.wait(30) == -signal.SIGTERM

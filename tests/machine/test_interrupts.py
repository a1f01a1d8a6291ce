"""Signals to a command: raised in Python code, and ending the process in C code."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_train.machine.interrupts import ends_after_signals


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_python_code(number: signal.Signals, error: type[BaseException]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(error), ends_after_signals():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) is before
    os.kill(os.getpid(), signal.SIGURG)  # reaches no closed socket


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_in_a_callback_of_the_garbage_collector(
    number: signal.Signals, error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """Python drops what is raised there."""

    def callback(*_: object) -> None:
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    with pytest.raises(error), ends_after_signals():
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_error_that_c_code_makes_of_a_signal(number: signal.Signals, error: type[BaseException]) -> None:
    with pytest.raises(error), ends_after_signals():
        try:
            signal.raise_signal(number)
        except BaseException as interruption:
            raise ImportError("initialization failed") from interruption  # as pybind11 does
    with pytest.raises(ImportError), ends_after_signals():
        raise ImportError


class ExtensionFileLoader:
    """Its method has the name of the one of `importlib` that starts a C extension."""

    has_ended = False

    def exec_module(self, number: signal.Signals) -> None:
        signal.raise_signal(number)
        time.sleep(0.2)
        self.has_ended = True


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_waits_for_the_start_of_a_c_extension(number: signal.Signals, error: type[BaseException]) -> None:
    loader = ExtensionFileLoader()
    with pytest.raises(error), ends_after_signals():
        loader.exec_module(number)
        time.sleep(5)
    assert loader.has_ended


IN_C_CODE = """
import ctypes, os
from moe_train.machine import interrupts
interrupts.EXIT_SECONDS = 0.2
with interrupts.ends_after_signals():
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second time it waits for itself, whatever signals arrive
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_in_c_code(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", IN_C_CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # until it waits inside the call
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert f"ended by {number.name} within a call that cannot be interrupted" in error


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run() -> None:
        with ends_after_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]

"""What the processes of tests/zoo/test_zoo.py work on; no torch here, so that they start fast."""

import os
import time


def work(name: str) -> str:
    if name == "slow":
        time.sleep(60)
    if name == "dies":
        os._exit(3)
    if name == "hungry":
        return str(len(bytearray(2**31)))
    return f"{name} by {os.getpid()}"


def failed(name: str, reason: str, seconds: float) -> str:
    return f"{name}: {reason}"

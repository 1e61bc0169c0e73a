"""Reward functions, good and bad, that the tests run in worker processes."""

import ctypes
import math
import os
import sys
import time


def length_reward(problem, completion):
    print("a reward may print")
    return len(completion) / problem["metadata"]["longest"]


def misbehave(problem, completion):
    actions = {
        "raise": lambda: 1 / 0,
        "sleep": lambda: time.sleep(60),
        "loop in C": lambda: 3 ** (10**9),
        "exit": lambda: sys.exit(3),
        "die": lambda: os._exit(3),
        "crash": lambda: ctypes.string_at(0),
        "eat memory": lambda: len(bytearray(3 << 30)),
        "recurse": lambda: misbehave(problem, completion),
        "return text": lambda: "1.0",
        "return nothing": lambda: None,
        "return nan": lambda: math.nan,
        "return an object": object,
        "behave": lambda: True,
    }
    return actions[completion]()


def loaded_modules():
    return sorted(sys.modules)


def threes(problem, completion):
    """Full marks for a text with a three; fails where there is a four."""
    if "4" in completion:
        raise RuntimeError("no fours")
    return float("3" in completion)


def fragile(problem, completion):
    """Full marks for a text that begins with the answer; dies at an "a", hangs at a "b"."""
    if completion.startswith("a"):
        os._exit(3)
    if completion.startswith("b"):
        time.sleep(60)
    return float(completion.startswith(problem["answer"]))

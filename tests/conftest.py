"""For all tests: a cache of their own, and where no GPU is, Triton's interpreter, switched on before triton is imported."""

import importlib.metadata
import importlib.util
import os
import tempfile
from typing import Any

import torch

os.environ["M1_CACHE"] = tempfile.mkdtemp(prefix="m1-test-cache-")  # nothing of a test's is left in the user's own


def is_older(package: str, version: tuple[int, int]) -> bool:
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2])) < version


def mend_interpreted_loop_bounds() -> None:
    """Triton before 3.9 turns a loop's bound, an array of one element, into a number with int(), which numpy 2.5 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") and is_older("triton", (3, 9)) and not is_older("numpy", (2, 5)):
        mend_interpreted_loop_bounds()

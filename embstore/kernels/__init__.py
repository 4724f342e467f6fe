"""The fast loops of the schemes' lookups; a scheme's own `compose`, in plain torch, is the definition of correct.

* `numba_*`: numpy arrays in, fused loops that release the GIL (`numba_rows` reads rows of any storage dtype);
* `triton_*`: CUDA tensors in, one launch a lookup;
* `reference`: `compose` behind the same contract, on any device.

Which of them runs follows from the type and device of `out` and nothing else: no environment variable, no fallback at
run time. Contract of all: `ids` are int64, checked by the caller to lie in `[0, num_embeddings)` or to be negative;
a negative id leaves its row of `out` untouched, so a missing id can never receive another id's vector.

This package imports neither numba nor triton before a loop is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

Array = Any
"""numpy.ndarray or torch.Tensor, the same kind for every argument of one call."""


class Loops:
    """The loops of one file of this package, imported when the first of them is called: numba takes a while to load.

    numba_gather = Loops("numba_gather")
    numba_gather.gather(weight, ids, out)
    """

    def __init__(self, file: str) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        loop = getattr(import_module(f"embstore.kernels.{self._file}"), name)
        setattr(self, name, loop)  # found without this function from now on
        return loop

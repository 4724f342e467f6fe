"""The fast loops of the schemes' lookups; a scheme's own `compose`, in plain torch, is the definition of correct.

* `cpu`: numpy arrays in, fused loops that release the GIL (`cpu.rows` reads rows of any storage dtype);
* `cuda`: CUDA tensors in, one launch a lookup;
* `reference`: `compose` behind the same contract, on any device.

A file is named after its scheme, in both folders; SHARED lists those that serve several. `warm` compiles what does not
depend on a table's scheme.

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


SHARED = {
    "gather": ("full", "hash", "memcom", "qr", "dhe"),
    "split": ("frequency", "learned_hash", "mixed_precision"),
    "hashed": ("double_hash", "mem_rec"),
    "memory": ("robe", "lma"),
    "project": ("low_rank", "mixed_dim"),
}
"""Files of `cpu` and `cuda` that several schemes use, and which."""


class Loops:
    """The loops of one file of this package, imported when the first of them is called: numba takes a while to load.

    cpu_gather = Loops("cpu.gather")
    cpu_gather.gather(weight, ids, out)
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        loop = getattr(import_module(f"embstore.kernels.{self.file}"), name)
        setattr(self, name, loop)  # found without this function from now on
        return loop

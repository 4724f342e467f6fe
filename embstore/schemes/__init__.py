"""The compression schemes: drop-in replacements for `torch.nn.Embedding` that store less.

A scheme is one file here and one line in SCHEMES; the trainer, the store, the server and the contract tests find it
there. What else names every scheme is made from it by `python tests/support/derived.py`: the imports for type checkers
below and the table of docs/schemes.md.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from embstore.errors import ConfigError

SCHEMES = {
    "full": "Full",
    "hash": "Hash",
    "double_hash": "DoubleHash",
    "frequency": "Frequency",
    "low_rank": "LowRank",
    "mixed_dim": "MixedDim",
    "masked": "Masked",
    "qr": "QR",
    "path": "PathBased",
    "memcom": "MEmCom",
    "mem_rec": "MEMRec",
    "learned_hash": "LearnedHash",
    "robe": "ROBE",
    "lma": "LMA",
    "dhe": "DHE",
    "mixed_precision": "MixedPrecision",
    "pq": "PQ",
}
"""Stable name, as it stands in manifests, and class. The name is also that of the file."""

if TYPE_CHECKING:
    from embstore.schemes.base import Scheme as Scheme

    # made by `python tests/support/derived.py`
    from embstore.schemes.dhe import DHE as DHE
    from embstore.schemes.double_hash import DoubleHash as DoubleHash
    from embstore.schemes.frequency import Frequency as Frequency
    from embstore.schemes.full import Full as Full
    from embstore.schemes.hash import Hash as Hash
    from embstore.schemes.learned_hash import LearnedHash as LearnedHash
    from embstore.schemes.lma import LMA as LMA
    from embstore.schemes.low_rank import LowRank as LowRank
    from embstore.schemes.masked import Masked as Masked
    from embstore.schemes.mem_rec import MEMRec as MEMRec
    from embstore.schemes.memcom import MEmCom as MEmCom
    from embstore.schemes.mixed_dim import MixedDim as MixedDim
    from embstore.schemes.mixed_precision import MixedPrecision as MixedPrecision
    from embstore.schemes.path import PathBased as PathBased
    from embstore.schemes.pq import PQ as PQ
    from embstore.schemes.qr import QR as QR
    from embstore.schemes.robe import ROBE as ROBE
    # end


def scheme_class(name: str) -> type[Scheme]:
    """The class of a scheme by its stable name; ConfigError names the close match for an unknown one."""
    if name not in SCHEMES:
        near = get_close_matches(str(name), SCHEMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no scheme named {name!r}: the schemes are {', '.join(SCHEMES)}{hint}")
    found: type[Scheme] = getattr(import_module(f"embstore.schemes.{name}"), SCHEMES[name])
    return found


def __getattr__(name: str) -> Any:
    """`from embstore.schemes import MEmCom` loads just that scheme's file."""
    for scheme, class_name in {**SCHEMES, "base": "Scheme"}.items():
        if class_name == name:
            return getattr(import_module(f"embstore.schemes.{scheme}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

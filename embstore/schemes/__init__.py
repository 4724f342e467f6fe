"""The compression schemes: drop-in replacements for `torch.nn.Embedding` that store less.

`SCHEMES` maps each stable name, as it stands in manifests, to where its class lives. Adding a scheme is one file and
one line here; the contract tests, the trainer, the store and the server pick it up from this table.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from embstore.errors import ConfigError

if TYPE_CHECKING:
    from embstore.schemes.base import Scheme as Scheme
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

SCHEMES = {
    "full": "embstore.schemes.full:Full",
    "hash": "embstore.schemes.hash:Hash",
    "double_hash": "embstore.schemes.double_hash:DoubleHash",
    "frequency": "embstore.schemes.frequency:Frequency",
    "low_rank": "embstore.schemes.low_rank:LowRank",
    "mixed_dim": "embstore.schemes.mixed_dim:MixedDim",
    "masked": "embstore.schemes.masked:Masked",
    "qr": "embstore.schemes.qr:QR",
    "path": "embstore.schemes.path:PathBased",
    "memcom": "embstore.schemes.memcom:MEmCom",
    "mem_rec": "embstore.schemes.mem_rec:MEMRec",
    "learned_hash": "embstore.schemes.learned_hash:LearnedHash",
    "robe": "embstore.schemes.robe:ROBE",
    "lma": "embstore.schemes.lma:LMA",
    "dhe": "embstore.schemes.dhe:DHE",
    "mixed_precision": "embstore.schemes.mixed_precision:MixedPrecision",
    "pq": "embstore.schemes.pq:PQ",
}

_CLASSES = {path.partition(":")[2]: path for path in (*SCHEMES.values(), "embstore.schemes.base:Scheme")}


def scheme_class(name: str) -> type[Scheme]:
    """The class of a scheme by its stable name; ConfigError names the close match for an unknown one."""
    if name not in SCHEMES:
        near = get_close_matches(str(name), SCHEMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no scheme named {name!r}: the schemes are {', '.join(SCHEMES)}{hint}")
    module, _, attribute = SCHEMES[name].partition(":")
    found: type[Scheme] = getattr(import_module(module), attribute)
    return found


def __getattr__(name: str) -> Any:
    """`from embstore.schemes import MEmCom` loads just that scheme's file."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _CLASSES[name].partition(":")
    return getattr(import_module(module), attribute)

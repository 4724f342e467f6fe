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
    from embstore.schemes.full import Full as Full
    from embstore.schemes.hash import Hash as Hash
    from embstore.schemes.memcom import MEmCom as MEmCom
    from embstore.schemes.qr import QR as QR

SCHEMES = {
    "full": "embstore.schemes.full:Full",
    "hash": "embstore.schemes.hash:Hash",
    "qr": "embstore.schemes.qr:QR",
    "memcom": "embstore.schemes.memcom:MEmCom",
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

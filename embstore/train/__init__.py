"""The offline trainer: events in, one release of compressed tables out.

    events (Parquet, CSV) -> rows by frequency -> factorisation -> fit -> evaluate -> store.publish_release

`run.train` tells that story from top to bottom; every other file here is one of its steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embstore.common.progress import Reporter as Reporter
    from embstore.common.progress import make_reporter as make_reporter
    from embstore.train.config import TrainConfig as TrainConfig
    from embstore.train.config import load_config as load_config
    from embstore.train.result import TrainResult as TrainResult
    from embstore.train.run import train as train

_HOMES = {
    "Reporter": "embstore.common.progress",
    "make_reporter": "embstore.common.progress",
    "TrainConfig": "embstore.train.config",
    "load_config": "embstore.train.config",
    "TrainResult": "embstore.train.result",
    "train": "embstore.train.run",
}


def __getattr__(name: str) -> Any:
    """`from embstore.train import load_config` does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

"""Fuzz everything that reads bytes from the network: `python tests/fuzz/fuzz_codec.py -max_total_time=600`.

Needs `pip install atheris` (Linux, CPython 3.11). Without it the same targets run in tests/fuzz/test_replay.py.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Run libFuzzer over the targets; the arguments are libFuzzer's own."""
    import atheris

    sys.path.insert(0, str(Path(__file__).parents[1]))
    with atheris.instrument_imports(include=["server", "embstore.pooling", "embstore.ids"]):
        from fuzz import targets
    targets.handler()  # tables are made and loops compiled before the first input
    atheris.Setup(sys.argv, targets.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Changes of a store without torch: `python -m embstore.store.republish publish|promote STORE TABLE VERSION LABEL`.

For load tests, which change what is served meanwhile: `embstore publish` takes files of vectors, which the rows of a
compressed version are not, and both it and `embstore promote` load torch, seconds of a core that may be the server's.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from embstore.errors import EmbstoreError
from embstore.store.local import FileStore, now


def publish(root: str, table: str, source: str, label: str) -> str:
    """Publish what a version holds once more, whatever its scheme and ids, and move the label there; what was done."""
    store = FileStore(root)
    stored = store.read_version(table, store.resolve(table, source), verify=False)
    manifest = replace(stored.manifest, parent=stored.manifest.version, created=now())
    with store.stage(manifest, stored.arrays) as staged, store.turn():
        version = staged.commit()
        store.set_label(table, label, version)
    return f"version {version}, the rows of version {stored.manifest.version}, label {label}"


def promote(root: str, table: str, source: str, label: str) -> str:
    """Move a label to a version, unverified; what was done."""
    store = FileStore(root)
    version = store.resolve(table, source)
    with store.turn():
        store.set_label(table, label, version)
    return f"version {version}, label {label}"


def main(arguments: list[str]) -> int:
    """One change; what was done on stdout, or why not on stderr."""
    action, *where = arguments
    try:
        sys.stdout.write({"publish": publish, "promote": promote}[action](*where) + "\n")
    except EmbstoreError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

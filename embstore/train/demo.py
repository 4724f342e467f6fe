"""Demo data: made-up clicks with a structure that training must find, and a config that trains on them.

Users have a taste among hidden topics, items belong to one topic each and are popular to very different degrees, and
most clicks of a user go to the topics of their taste. User ids are sparse 64-bit integers, item ids are strings.
"""

# Shapes: U users, I items, E events, T topics.

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import polars as pl

from embstore.store.local import FileStore

NUM_USERS = 6_000
NUM_ITEMS = 3_000
NUM_TOPICS = 24
MEAN_EVENTS = 30
SHARE_OF_TASTE = 0.85
FIRST_CLICK_MS = 1_780_272_000_000
DAY_MS = 86_400_000

TABLES = """\
[tables.user]
scheme = "memcom"
ratio = 2

[tables.item]
scheme = "qr"
ratio = 4
"""
ONE_SCHEME = """\
[tables.user]
scheme = "{scheme}"
{ratio}
[tables.item]
scheme = "{scheme}"
{ratio}"""
RATIO = 2.5
"""Demo tables of one scheme are this much smaller: every scheme can be, in 32 columns."""

CONFIG = """\
# Made-up clicks with planted topics: see embstore/train/demo.py.
task = "ranking"
seed = {seed}

[data]
path = "clicks.parquet"
user = "user_id"
item = "item_id"
time = "timestamp_ms"
split = "leave_last_out"
num_validation = 1_000

[model]
embedding_dim = 32

{tables}

[training]
batch_size = 1024
learning_rate = 0.2
l2 = 0.03
max_epochs = 10
patience = 1

[evaluation]
cutoff = 10
"""


def write_demo(folder: Path, *, seed: int = 0, scheme: str | None = None, ratio: float = RATIO) -> Path:
    """Write `clicks.parquet` and `demo.toml` into `folder`, the same for the same seed; returns the config's path.

    scheme: store both tables by it, `ratio` times smaller than plain ones; None: memcom and qr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_clicks(seed).write_parquet(folder / "clicks.parquet")
    config = folder / "demo.toml"
    size = "" if scheme == "full" else f"ratio = {ratio}\n"
    tables = TABLES if scheme is None else ONE_SCHEME.format(scheme=scheme, ratio=size)
    config.write_text(CONFIG.format(seed=seed, tables=tables), "utf-8")
    return config


def make_clicks(seed: int = 0) -> pl.DataFrame:
    """Columns user_id (int64, sparse), item_id (text), timestamp_ms; in order of time."""
    rng = np.random.default_rng(seed)
    topic_I = rng.integers(NUM_TOPICS, size=NUM_ITEMS)
    popularity_I = 1.0 / (1.0 + rng.permutation(NUM_ITEMS)) ** 0.8
    likes_U = rng.integers(NUM_TOPICS, size=NUM_USERS)
    num_events_U = 4 + rng.geometric(1 / (MEAN_EVENTS - 4), NUM_USERS)
    user_E = np.repeat(np.arange(NUM_USERS), num_events_U)
    liked_E = np.where(rng.random(len(user_E)) < SHARE_OF_TASTE, likes_U[user_E], -1)
    item_E = np.empty(len(user_E), np.int64)
    for topic in range(-1, NUM_TOPICS):
        members = np.flatnonzero((topic_I == topic) | (topic == -1))
        events = np.flatnonzero(liked_E == topic)
        chances = popularity_I[members] / popularity_I[members].sum()
        item_E[events] = rng.choice(members, len(events), p=chances)
    user_ids_U = np.unique(rng.integers(1 << 62, size=2 * NUM_USERS))
    clicks = pl.DataFrame(
        {
            "user_id": rng.permutation(user_ids_U)[:NUM_USERS][user_E],
            "item_id": [f"sku-{number:05x}" for number in rng.permutation(1 << 20)[:NUM_ITEMS][item_E]],
            "timestamp_ms": FIRST_CLICK_MS + rng.integers(30 * DAY_MS, size=len(user_E)),
        }
    )
    return clicks.sort("timestamp_ms", maintain_order=True)


def curl_lines(store: FileStore, folder: Path, url: str) -> str:
    """Three lines that work as they are, once the server runs."""
    tables = store.tables()
    hot = {name: store.manifest(name, store.resolve(name)).hot_ids[:2] for name in tables}

    def body(value: object) -> str:
        return orjson.dumps(value).decode()

    first, last = tables[0], tables[-1]
    many = {"tables": {name: {"ids": hot[name]} for name in tables}}
    octets = "".join(f"\\{byte:03o}" for one in hot[last] for byte in int(one).to_bytes(8, "little", signed=True))
    binary = f"curl {url}/v1/tables/{last}/lookup -H 'Content-Type: application/octet-stream' --data-binary @- -s"
    return "\n".join(
        [
            "",
            f"The demo store is in {folder / 'store'}. Once a server serves it, in another terminal:",
            "",
            f"curl {url}/v1/tables/{first}/lookup -H 'Content-Type: application/json' -d '{body({'ids': hot[first]})}'",
            "",
            f"curl {url}/v1/lookup -H 'Content-Type: application/json' -d '{body(many)}'",
            "",
            f"printf '{octets}' | {binary} | od -A d -t f4 | head -4",
            "",
        ]
    )

"""How rows lie in Redis: keys, values, and the checks that make a value a row again or nothing.

Key: `e:<table>:<version>:<fingerprint>:<row>`, the row in ten hex digits. Value: 24 bytes of header and the float32
bytes of the row. The header holds a tag of table, version and fingerprint, the row's number, and a checksum of the
floats; bytes of another table, version or row, of another writer, shortened, shifted or flipped, do not pass.

Everything here is done for many rows at once: all keys have one length and so have all values, so that a command is one
array of bytes with a line for each row.
"""

# Shapes: K rows in one call, D embedding_dim.

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embstore.table import Table

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
FORMAT = 1
HEADER_BYTES = 24
ROW_DIGITS = 10
TTL_JITTER = 0.1
_HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), "<u2")


class Checked(NamedTuple):
    """hits bool [K]; how many values were of something else (stale) and how many were damaged (wrong)."""

    hits_K: NDArray[np.bool_]
    stale: int
    wrong: int


class RowFormat:
    """Commands and values of one version of one table."""

    def __init__(self, table: Table, ttl_seconds: int) -> None:
        self.embedding_dim = table.embedding_dim
        self.value_bytes = HEADER_BYTES + 4 * table.embedding_dim
        name = f"{table.name}:{table.version}:{table.fingerprint}"
        digest = hashlib.blake2b(f"{FORMAT}:{name}:{table.embedding_dim}".encode(), digest_size=8).digest()
        self._tag = np.frombuffer(digest, "<u8")[0]
        # Odd weights: a change of any one word changes the sum. The generator's raw stream is the same everywhere.
        self._weights_D = np.random.PCG64(20260731).random_raw(table.embedding_dim) | np.uint64(1)
        self._row_weight = np.uint64(0x9E3779B97F4A7C15)
        key = b"e:%b:" % name.encode() + b"0" * ROW_DIGITS
        argument = b"$%d\r\n%b\r\n" % (len(key), key)
        self._key = np.frombuffer(argument, np.uint8)
        least, most = _ttl_range(ttl_seconds)
        self._least_ttl, self._num_ttls = least, most - least + 1
        digits = len(str(least))
        head = b"*5\r\n$3\r\nSET\r\n" + argument + b"$%d\r\n" % self.value_bytes
        tail = b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (digits, b"0" * digits)
        self._set = np.frombuffer(head + bytes(self.value_bytes) + tail, np.uint8)
        self._key_at = len(head) - len(b"$%d\r\n" % self.value_bytes) - 2 - ROW_DIGITS
        self._value_at = len(head)
        self._ttl_powers = 10 ** np.arange(digits - 1, -1, -1)

    def get_command(self, rows_K: Rows, rows_a_command: int) -> bytes:
        """MGETs of these rows, so many in each."""
        lines = np.empty((len(rows_K), len(self._key)), np.uint8)
        lines[:] = self._key
        lines[:, -2 - ROW_DIGITS : -2] = _hex_digits(rows_K)
        parts: list[bytes] = []
        for start in range(0, len(rows_K), rows_a_command):
            part = lines[start : start + rows_a_command]
            parts += (b"*%d\r\n$4\r\nMGET\r\n" % (len(part) + 1), part.tobytes())
        return b"".join(parts)

    def set_command(self, rows_K: Rows, vectors_KD: Floats) -> bytes:
        """A SET of each row, each with a time to live of its own."""
        lines = np.empty((len(rows_K), len(self._set)), np.uint8)
        lines[:] = self._set
        lines[:, self._key_at : self._key_at + ROW_DIGITS] = _hex_digits(rows_K)
        words_KD = np.ascontiguousarray(vectors_KD, "<f4").view("<u4")
        header = np.empty((len(rows_K), 3), "<u8")
        header[:, 0], header[:, 1], header[:, 2] = self._tag, rows_K, self._checksums(words_KD, rows_K)
        lines[:, self._value_at : self._value_at + HEADER_BYTES] = header.view(np.uint8)
        lines[:, self._value_at + HEADER_BYTES : self._value_at + self.value_bytes] = words_KD.view(np.uint8)
        # The time to live follows from the checksum: spread out, and no random numbers to draw.
        ttls = self._least_ttl + (header[:, 2] >> np.uint64(32)).astype(np.int64) % self._num_ttls
        digits = ttls[:, None] // self._ttl_powers % 10
        lines[:, -2 - len(self._ttl_powers) : -2] = digits + ord("0")
        return lines.tobytes()

    def read(self, rows_K: Rows, values: Sequence[bytes | None], out_KD: Floats) -> Checked:
        """Copy the values that are these rows into `out`; TypeError or ValueError if a value is not bytes or None."""
        sizes_K = np.fromiter(map(len, [value or b"" for value in values]), np.int64, len(values))
        at = np.flatnonzero(sizes_K == self.value_bytes)
        hits_K = np.zeros(len(rows_K), np.bool_)
        odd = len(values) - len(at) - int(np.count_nonzero(sizes_K == 0))
        if len(at) == 0:
            return Checked(hits_K, 0, odd)
        whole = values if len(at) == len(values) else [values[i] for i in at.tolist()]
        words = np.frombuffer(b"".join(whole), "<u4").reshape(len(at), -1)  # type: ignore[arg-type]
        header = np.ascontiguousarray(words[:, : HEADER_BYTES // 4]).view("<u8")
        words_D = words[:, HEADER_BYTES // 4 :]
        rows = rows_K[at]
        ours = (header[:, 0] == self._tag) & (header[:, 1] == rows.view(np.uint64))
        right = ours & (header[:, 2] == self._checksums(words_D, rows))
        num_ours, num_right = int(np.count_nonzero(ours)), int(np.count_nonzero(right))
        if num_right == len(values):
            out_KD[:] = words_D.view("<f4")
            hits_K[:] = True
        else:
            hits_K[at[right]] = True
            out_KD[hits_K] = words_D[right].view("<f4")
        return Checked(hits_K, len(at) - num_ours, num_ours - num_right + odd)

    def _checksums(self, words: NDArray[np.uint32], rows: Rows) -> NDArray[np.uint64]:
        """A number that any changed word, and nearly any changed words, change; 64 bits, of floats and row."""
        sums: NDArray[np.uint64] = np.einsum("kd,d->k", words, self._weights_D)
        return sums + rows.view(np.uint64) * self._row_weight


def _hex_digits(rows_K: Rows) -> NDArray[np.uint8]:
    """Ten lower-case hex digits a row, uint8 [K, 10]."""
    bytes_K8 = rows_K.astype(">i8").view(np.uint8).reshape(-1, 8)
    return np.ascontiguousarray(_HEX[bytes_K8[:, 8 - ROW_DIGITS // 2 :]]).view(np.uint8)


def _ttl_range(seconds: int) -> tuple[int, int]:
    """Milliseconds from a tenth below to a tenth above, of one number of digits so that commands have one length."""
    least, most = int(1000 * seconds * (1 - TTL_JITTER)), int(1000 * seconds * (1 + TTL_JITTER))
    if len(str(least)) < len(str(most)):
        least = 10 ** (len(str(most)) - 1)
    return least, most

"""What makes a reply the answer to a request: headers, lengths and shapes, never the numbers themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OCTETS, JSON = "application/octet-stream", "application/json"
INFER_SIZE = "inference-header-content-length"
MANY = "embstore"
"""The model of the Open Inference Protocol that is all tables together."""
RELEASE = "release"
"""Stands for the table where a whole release answered."""
DATATYPES = {"float32": "FP32", "float16": "FP16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
MAX_DIGITS, MOST_SAID = 18, 300
_MODEL_VERSION = re.compile(rb'"model_version": ?"([^"]+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseCheck:
    """What makes a 2xx reply the answer to a request for `counts[i]` rows of `tables[i]`.

    pinned: the version, for several tables the release, that was expected; empty: whichever.
    Names of headers are in lower case. A body that nobody kept is None: then headers and its length are all there is.
    """

    protocol: str
    tables: tuple[str, ...]
    counts: tuple[int, ...]
    dtype: str = "float32"
    pinned: str = ""

    def problem(
        self, status: int, headers: Mapping[str, str], body: bytes | None, num_bytes: int | None = None
    ) -> str | None:
        """Why a 2xx reply is not the answer, as `mislabelled: expected 10 rows, got ...`; None when it is.

        num_bytes is the length of the body, needed where that is None.
        """
        if not 200 <= status < 300:
            return None
        size = len(body) if body is not None else num_bytes
        if size is None:
            raise ValueError("a reply without its body needs num_bytes")
        try:
            found = self._problem(headers, body, size)
        except Exception as error:  # whatever a server sends, it is the server's
            found = f"expected an answer, got a reply that cannot be read: {type(error).__name__}"
        return found and f"mislabelled: {_plain(found, MOST_SAID)}"

    def _problem(self, headers: Mapping[str, str], body: bytes | None, size: int) -> str | None:
        if self.protocol == "infer":
            return self._infer_problem(headers, body, size)
        if self.protocol == "octet":
            return self._rows_problem(headers) or self._octet_problem(headers, size)
        found = self._rows_problem(headers) if len(self.tables) == 1 else self._release_problem(headers)
        return found or (self._json_problem(body) if body is not None else None)

    def version(self, headers: Mapping[str, str], body: bytes | None) -> tuple[str, str] | None:
        """Table and version that a 2xx reply comes from, or `release` and its id; None where it does not say."""
        many = len(self.tables) > 1
        if self.protocol == "infer":
            head = (body or b"")[: _number(headers.get(INFER_SIZE))]
            match = _MODEL_VERSION.search(head)
            version = match[1].decode("utf-8", "replace") if match else None
        else:
            version = headers.get("x-embedding-release" if many else "x-embedding-version")
        return (RELEASE if many else self.tables[0], version) if version else None

    def _rows_problem(self, headers: Mapping[str, str]) -> str | None:
        """What headers of a reply of one table say that was not expected."""
        shape = headers.get("x-embedding-shape", "")
        rows, _, dim = shape.partition(",")
        if rows != str(self.counts[0]) or not _number(dim):
            return f"expected {self.counts[0]} rows, got {_said('X-Embedding-Shape', shape)}"
        if (dtype := headers.get("x-embedding-dtype")) != self.dtype:
            return f"expected {self.dtype}, got {_said('X-Embedding-Dtype', dtype)}"
        version = headers.get("x-embedding-version")
        if not version or (self.pinned and version != self.pinned):
            return f"expected version {self.pinned or 'any'}, got {_said('X-Embedding-Version', version)}"
        return None

    def _octet_problem(self, headers: Mapping[str, str], size: int) -> str | None:
        """Whether the body has the length of the rows, and of the bits that say which ids were found."""
        if (given := headers.get("content-type", "")).partition(";")[0] != OCTETS:
            return f"expected {OCTETS}, got {_said('Content-Type', given)}"
        rows, dim = self.counts[0], int(headers["x-embedding-shape"].partition(",")[2])
        wanted = rows * row_bytes(dim, self.dtype)
        if headers.get("x-embedding-missing", "0") != "0":
            wanted += -(-rows // 8)
        return None if size == wanted else f"{rows} rows of {dim} {self.dtype} take {wanted} bytes, got {size}"

    def _release_problem(self, headers: Mapping[str, str]) -> str | None:
        release = headers.get("x-embedding-release")
        if self.pinned and release != self.pinned:
            return f"expected release {self.pinned}, got {_said('X-Embedding-Release', release)}"
        return None

    def _json_problem(self, body: bytes) -> str | None:
        """Whether JSON names the tables and opens as many lists as there are vectors: read, but not parsed."""
        for table in self.tables:
            if json.dumps(table, ensure_ascii=False).encode() not in body:
                return f"expected table {table}, got a body that does not name it"
        founds = body.count(b'"found":[') + body.count(b'"found": [')
        rows = body.count(b"[") - len(self.tables) - founds
        if rows != sum(self.counts) or not body.rstrip().endswith(b"}"):
            return f"expected {sum(self.counts)} vectors, got JSON of {rows}"
        return None

    def _infer_problem(self, headers: Mapping[str, str], body: bytes | None, size: int) -> str | None:
        """Whether the outputs are those expected, in shape, type and length."""
        head_size = _number(headers.get(INFER_SIZE))
        if not 0 < head_size <= size:
            return f"expected binary outputs, got {_said('Inference-Header-Content-Length', headers.get(INFER_SIZE))}"
        if body is None:
            return None
        try:
            head: dict[str, Any] = json.loads(body[:head_size])
            outputs = {output["name"]: output for output in head["outputs"]}
            return self._outputs_problem(head, outputs, size - head_size)
        except (ValueError, TypeError, KeyError, IndexError):
            return "expected an inference reply, got a head that is none"

    def _outputs_problem(self, head: dict[str, Any], outputs: dict[str, Any], size: int) -> str | None:
        many = len(self.tables) > 1
        model, version = (MANY if many else self.tables[0]), head["model_version"]
        if head["model_name"] != model or (self.pinned and version != self.pinned):
            wanted = f"expected model {model} {self.pinned}".rstrip()
            return f"{wanted}, got {_plain(head['model_name'])} {_plain(version)}"
        for table, count in zip(self.tables, self.counts, strict=True):
            name = table if many else "embeddings"
            if name not in outputs:
                return f"expected output {name}, got {_plain(', '.join(outputs) or 'none')}"
            shape, datatype = outputs[name]["shape"], outputs[name]["datatype"]
            whole = len(shape) == 2 and type(shape[1]) is int and shape[1] > 0
            if not whole or shape[0] != count or datatype != DATATYPES[self.dtype]:
                return f"expected {count} rows of {DATATYPES[self.dtype]}, got {_output(outputs[name])}"
            num_bytes = outputs[name]["parameters"]["binary_data_size"]
            if num_bytes != count * row_bytes(shape[1], self.dtype):
                return f"{_output(outputs[name])} does not take {_plain(num_bytes)} bytes"
            size -= num_bytes
        return f"outputs take {abs(size)} bytes {'more' if size < 0 else 'less'} than the body has" if size else None


def row_bytes(dim: int, dtype: str) -> int:
    """Bytes of one row: int8 codes have a float32 scale and bias behind them."""
    return dim * ITEM_BYTES[dtype] + (8 if dtype == "int8" else 0)


def _number(text: str | None) -> int:
    """A header's whole number, 0 where there is none."""
    return int(text) if text and len(text) <= MAX_DIGITS and text.isascii() and text.isdigit() else 0


def _said(name: str, value: str | None) -> str:
    return f"{name} {_plain(value)}" if value else f"no {name}"


def _output(output: dict[str, Any]) -> str:
    return f"shape {_plain(output['shape'])} of {_plain(output['datatype'])}"


def _plain(value: object, most: int = 80) -> str:
    """What a reply says as printable ASCII, cut: it goes to terminals and into files."""
    text = str(value)[:most]
    return "".join(one if " " <= one <= "~" else ascii(one)[1:-1] for one in text)

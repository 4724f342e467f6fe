"""The server that is tested, before any load: how to reach it, and which tables it has."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx

from embstore.common.api_keys import read_api_keys
from embstore.errors import ConfigError
from loadtest.errors import LoadError, ScenarioError
from loadtest.scenario.model import Scenario

ASK_SECONDS = 10.0


def api_headers(scenario: Scenario) -> list[tuple[str, str]]:
    """Headers with the API key, none where there is none: the first line of the file that is no comment."""
    if not scenario.api_key_file:
        return []
    try:
        return [("x-api-key", read_api_keys(Path(scenario.api_key_file))[0])]
    except ConfigError as error:
        raise LoadError(f"api_key_file: {error}") from error


def tls_context(scenario: Scenario) -> ssl.SSLContext:
    """Which certificates are trusted."""
    try:
        context = ssl.create_default_context(cafile=scenario.ca or None)
    except (OSError, ssl.SSLError) as error:
        raise LoadError(f"ca: no certificates in {scenario.ca}: {_reason(error)}") from error
    if scenario.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def list_tables(scenario: Scenario) -> dict[str, int]:
    """Number of ids of every table that the scenario asks for; LoadError when the server is not there, or not ready
    for it, ScenarioError when the tables are too small, in one line that says what to do."""
    url = f"{scenario.url.rstrip('/')}/v1/tables"
    try:
        reply = httpx.get(
            url,
            headers=api_headers(scenario),
            verify=tls_context(scenario),
            timeout=ASK_SECONDS,
            trust_env=False,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LoadError(_unreachable(scenario, error)) from error
    if reply.status_code != 200:
        raise LoadError(f"GET {url}: {_refused(reply)}")
    try:
        listed = {str(table["table"]): table for table in reply.json()["tables"]}
        found = {name: int(table["num_ids"]) for name, table in listed.items()}
        of_strings = {name for name, table in listed.items() if table.get("id_space") == "string"}
    except (ValueError, KeyError, TypeError):
        raise LoadError(f"GET {url}: the reply is no list of tables; is this an embstore server?") from None
    wanted = {table for spec in scenario.requests for table in spec.tables}
    if unknown := sorted(wanted - found.keys()):
        raise LoadError(f"the server has no table {', '.join(unknown)}; it has {', '.join(sorted(found)) or 'none'}")
    for at, spec in enumerate(scenario.requests):
        if (strings := of_strings.intersection(spec.tables)) and not spec.ids.file:
            raise ScenarioError(_needs_file(scenario, at, min(strings), sorted(found.keys() - of_strings)))
        least = min(spec.ids.num_ids or found[table] for table in spec.tables)
        if spec.ids.kind == "hot" and not spec.ids.file and 0 < least <= spec.ids.hot_ids:
            raise ScenarioError(f"requests.{at}.ids.hot_ids must be below the {least:,} ids, got {spec.ids.hot_ids:,}")
    return {table: found[table] for table in wanted}


def _needs_file(scenario: Scenario, at: int, table: str, others: Sequence[str]) -> str:
    """What to do about a table whose ids nobody can make up, on the command line too."""
    flags = [f"--set requests.{at}.ids.file=FILE", f"--set requests.{at}.ids.column=NAME"]
    flags += [f"--set requests.{at}.protocol=json"] * (
        scenario.requests[at].protocol == "octet"
    )  # octet carries integers
    other = "--table " if len(scenario.requests) == 1 else f"--set requests.{at}.tables="
    another = f"; or use another table: {other}{others[0]}" if others else ""
    return (
        f"requests.{at}.ids.file: the ids of table {table} are strings: name a Parquet file that holds some, and its "
        f"column of them ({' '.join(flags)}){another}"
    )


def is_tls(error: BaseException) -> bool:
    """Whether TLS is what went wrong."""
    return any(isinstance(one, ssl.SSLError) for one in causes(error))


def causes(error: BaseException) -> Iterable[BaseException]:
    """An error, what caused it, what caused that."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _unreachable(scenario: Scenario, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if is_tls(error):
        advice = "; ca names the file of a certificate to trust, insecure trusts any" if "VERIFY" in reason else ""
        return f"TLS with {scenario.url} failed: {reason}{advice}"
    if isinstance(error, httpx.TimeoutException):
        return f"{scenario.url} does not answer in {ASK_SECONDS:g} s"
    if isinstance(error, httpx.ConnectError):
        return f"cannot connect to {scenario.url}: {reason}"
    return f"{scenario.url} does not speak HTTP as it should: {reason}"


def _refused(reply: httpx.Response) -> str:
    if reply.status_code in (401, 403):
        return f"{reply.status_code}: the server wants another API key; api_key_file names a file with one"
    try:
        detail: Any = reply.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = "is this an embstore server?"
    return f"{reply.status_code}: {' '.join(str(detail).split())[:200]}"


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

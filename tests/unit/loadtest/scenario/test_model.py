"""Scenarios from TOML: what is written is what is run, and what cannot be run is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from loadtest.errors import ScenarioError
from loadtest.scenario.model import Batch, Event, IdDistribution, Phase, RequestSpec, Scenario
from loadtest.scenario.rules import check
from loadtest.scenario.toml import read_scenario

EXAMPLES = sorted((Path(__file__).parents[4] / "loadtest" / "scenarios").glob("*.toml"))
WHOLE = """
name = "all of it"
url = "https://example.org"
mode = "open"
timeout = 3
insecure = true
fail_if = ["p99>10ms"]

[[phases]]
name = "ramp"
seconds = 5
rate = 1
rate_to = 20.5

[[requests]]
tables = ["item", "user"]
protocol = "json"
[requests.batch]
kind = "choice"
sizes = [1, 10]
weights = [3, 1]

[[requests]]
ids = { kind = "hot", hot_share = 1 }

[[events]]
at = 2
kind = "command"
command = ["true", "-x"]
"""


def test_a_file_says_everything(tmp_path: Path) -> None:
    """Every part of a scenario is read, whole numbers do for fractions, and the rest is as by default."""
    file = tmp_path / "s.toml"
    file.write_text(WHOLE)
    batch = Batch(kind="choice", sizes=(1, 10), weights=(3.0, 1.0))
    scenario = read_scenario(file)
    check(scenario)
    assert scenario == Scenario(
        name="all of it",
        url="https://example.org",
        timeout=3.0,
        insecure=True,
        fail_if=("p99>10ms",),
        phases=(Phase(name="ramp", seconds=5.0, rate=1.0, rate_to=20.5),),
        requests=(
            RequestSpec(tables=("item", "user"), protocol="json", batch=batch),
            RequestSpec(ids=IdDistribution(kind="hot", hot_share=1.0)),
        ),
        events=(Event(at=2.0, kind="command", command=("true", "-x")),),
    )


def test_a_scenario_survives_json(tmp_path: Path) -> None:
    """What is written into a result is the scenario that was run."""
    file = tmp_path / "s.toml"
    file.write_text(WHOLE)
    scenario = read_scenario(file)
    assert Scenario.from_json(json.loads(json.dumps(scenario.to_json()))) == scenario


def test_without_a_file_there_is_a_default() -> None:
    """The default scenario can be run."""
    assert read_scenario(None) == Scenario()
    check(Scenario())


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("url=http://host:1", Scenario(url="http://host:1")),
        ("phases.0.rate=500", Scenario(phases=(Phase(rate=500.0),))),
        ("scrape=false", Scenario(scrape=False)),
        ("requests.0.tables=item,user", Scenario(requests=(RequestSpec(tables=("item", "user")),))),
        ('requests.0.tables=["item"]', Scenario(requests=(RequestSpec(tables=("item",)),))),
        ("requests.0.ids.exponent=0.9", Scenario(requests=(RequestSpec(ids=IdDistribution(exponent=0.9)),))),
        ("requests.0.batch.sizes=1, 10", Scenario(requests=(RequestSpec(batch=Batch(sizes=(1, 10))),))),
        ("requests.0.version=7", Scenario(requests=(RequestSpec(version="7"),))),
        ("fail_if=p99>10ms", Scenario(fail_if=("p99>10ms",))),
        ("name=a = b", Scenario(name="a = b")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides_set_single_values(override: str, wanted: Scenario) -> None:
    """A value from the command line is what its field takes; text needs no quotes."""
    assert read_scenario(None, [override]) == wanted


def test_overrides_change_a_file(tmp_path: Path) -> None:
    """What a file says stays, but for what is set anew; a list is walked by number."""
    file = tmp_path / "s.toml"
    file.write_text(WHOLE)
    before, after = read_scenario(file), read_scenario(file, ["requests.1.ids.hot_share=0.5", "events.0.at=1"])
    requests = (before.requests[0], replace(before.requests[1], ids=IdDistribution(kind="hot", hot_share=0.5)))
    assert after == replace(before, requests=requests, events=(replace(before.events[0], at=1.0),))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rate=1", "--set rate=1: rate is unknown: did you mean phases.0.rate?"),
        (
            "requests.0.ids.exponet=1",
            "--set requests.0.ids.exponet=1: requests.0.ids.exponet is unknown: did you mean requests.0.ids.exponent?",
        ),
        (
            "requests.0.exponent=1",
            "--set requests.0.exponent=1: requests.0.exponent is unknown: did you mean requests.0.ids.exponent?",
        ),
        ("events.0.at=1", "--set events.0.at=1: no entry 0; there are 0, counted from 0"),
        ("phases.x.rate=1", "--set phases.x.rate=1: phases.x.rate is unknown"),
        ("phases.0=1", "--set phases.0=1: name one field, as in phases.0.name=..."),
        ("phases=1", "--set phases=1: phases.0: expected table, got '1'"),
        ("url.x=1", "--set url.x=1: url.x is unknown"),
        ("phases.0.rate=fast", "--set phases.0.rate=fast: expected float, got 'fast'"),
        ("processes=1.5", "--set processes=1.5: expected int, got '1.5'"),
        ("processes=true", "--set processes=true: expected int, got 'true'"),
        ("scrape=2", "--set scrape=2: expected bool, got '2'"),
        ("rate", "--set rate: expected FIELD=VALUE, as in phases.0.rate=500"),
    ],
    ids=lambda value: value.partition("=")[0] if " " not in value else "",
)
def test_overrides_that_fit_nowhere_are_told(override: str, message: str) -> None:
    """An override names a field that exists and a value of its type."""
    with pytest.raises(ScenarioError) as told:
        read_scenario(None, [override])
    assert str(told.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zzz = 1", "zzz is unknown: there are name, url, engine, "),
        ("[requests]", "requests: expected list, got {}"),
        ("requests = [1]", "requests.0: expected table, got 1"),
        ('[[requests]]\ntables = "item"', "requests.0.tables: expected list, got 'item'"),
        ("name = 1", "name: expected str, got 1"),
        ("name = x", "' is not valid TOML: Invalid value (at line 1, column 8)"),
    ],
    ids=["unknown", "table", "no table", "no list", "no string", "syntax"],
)
def test_files_that_are_no_scenarios_are_told(tmp_path: Path, text: str, message: str) -> None:
    """What is wrong with a file is named with its place."""
    file = tmp_path / "s.toml"
    file.write_text(text)
    with pytest.raises(ScenarioError) as told:
        read_scenario(file)
    assert message in str(told.value)
    assert str(file) in str(told.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    """The name of the file is in the message."""
    with pytest.raises(ScenarioError, match=r"cannot read scenario '.*s.toml': No such file or directory$"):
        read_scenario(tmp_path / "s.toml")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_can_be_run(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scenario that comes with the project passes its checks where the files that it names are."""
    monkeypatch.setenv("EMBSTORE_DATA", str(tmp_path / "data"))
    scenario = read_scenario(example)
    named = [spec.ids.file for spec in scenario.requests if spec.ids.file]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for file in named:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    for event in scenario.events:
        Path(event.store).mkdir(parents=True, exist_ok=True)
    check(scenario)
    assert example.read_text().startswith("# ")


def test_a_file_of_ids_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """${NAME} and ~ are replaced, in a file and in --set; a variable that is not set is one line that names it."""
    monkeypatch.setenv("SOME_DATA", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "s.toml"
    file.write_text('[[requests]]\nids = { file = "${SOME_DATA}/a.parquet" }\n')
    assert read_scenario(file).requests[0].ids.file == "/data/a.parquet"
    assert read_scenario(file, ["requests.0.ids.file=~/b"]).requests[0].ids.file == "/home/me/b"
    monkeypatch.delenv("SOME_DATA")
    with pytest.raises(ScenarioError) as raised:
        read_scenario(file)
    assert str(raised.value) == (
        "requests.0.ids.file: '${SOME_DATA}/a.parquet': environment variable SOME_DATA is not set"
    )


def requests(**fields: Any) -> dict[str, Any]:
    """A scenario's one spec."""
    return {"requests": (RequestSpec(**fields),)}


def phases(**fields: Any) -> dict[str, Any]:
    """A scenario's one phase."""
    return {"phases": (Phase(**fields),)}


def events(**fields: Any) -> dict[str, Any]:
    """A scenario's one event."""
    return {"events": (Event(**{"at": 1.0} | fields),)}


WARM = Phase(warmup=True)
CLOCK = IdDistribution(kind="replay", file=__file__, time_column="t")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"url": "127.0.0.1:8000"}, "url must begin with http:// or https:// and a host, got '127.0.0.1:8000'"),
    ({"url": "http://h:x"}, "url must begin with http:// or https:// and a host, got 'http://h:x'"),
    ({"url": "http://h/v1"}, "url must end after host and port: paths follow from requests; got 'http://h/v1'"),
    ({"insecure": True}, "insecure is for https:// only, and url begins with http://"),
    ({"url": "https://h", "engine": "raw"}, "engine raw speaks no TLS: use engine httpx for https://"),
    ({"url": "https://h", "ca": "x.pem"}, "ca 'x.pem' is not a file"),
    ({"api_key_file": "k"}, "api_key_file 'k' is not a file"),
    ({"engine": "wrk"}, "engine: expected httpx or raw, got 'wrk'"),
    ({"processes": 0}, "processes: expected int >= 1, got 0"),
    ({"processes": 9, "connections": 8}, "connections must be at least processes, one for each: 8 for 9"),
    ({"timeout": 0.0}, "timeout: expected float > 0.0, got 0.0"),
    ({"timeout": float("nan")}, "timeout: expected float > 0.0, got nan"),
    ({"seed": -1}, "seed: expected int >= 0, got -1"),
    ({"phases": ()}, "phases: expected list of length >= 1, got ()"),
    ({"phases": (WARM,)}, "phases are all warm-up: one at least must be measured"),
    ({"phases": (Phase(), WARM)}, "phases.1.warmup: a warm-up comes before everything that is measured"),
    (phases(rate=0.0), "phases: rate is 0 in all that are measured; one at least must send something"),
    (phases(rate=-1.0), "phases.0.rate: expected float >= 0.0, got -1.0"),
    (phases(rate_to=1e8), "phases.0.rate_to: expected float <= 10000000.0, got 100000000.0"),
    (phases(seconds=0.0), "phases.0.seconds: expected float > 0.0, got 0.0"),
    (phases(rate=float("inf")), "phases.0.rate: expected float <= 10000000.0, got inf"),
    ({"requests": ()}, "requests: expected list of length >= 1, got ()"),
    (requests(weight=0.0), "requests: weight is 0 in all of them; one must be above 0"),
    (
        {"requests": (RequestSpec(), RequestSpec())},
        "requests.1.name: requests.0 is called 'octet item' too; give each a name of its own",
    ),
    (requests(protocol="grpc"), "requests.0.protocol: expected octet, json or infer, got 'grpc'"),
    (requests(tables=("a", "b")), "requests.0.protocol: octet has one table; for several use json or infer"),
    (requests(tables=("a/b",)), "requests.0.tables.0: expected text matching regex "),
    (requests(tables=("a", "a"), protocol="json"), "requests.0.tables names a table twice"),
    (
        requests(dtype="int8", protocol="json"),
        "requests.0.dtype of json must be float32, float16 or bfloat16, got 'int8'",
    ),
    (requests(on_missing="fail"), "requests.0.on_missing: expected zero, default, error or hash, got 'fail'"),
    (requests(version="x"), "requests.0.version: expected text matching regex "),
    (requests(version="1\n"), "requests.0.version: expected text matching regex "),
    (requests(version="1", label="a"), "requests.0: version and label exclude each other: set one of them"),
    (requests(label="a", protocol="infer"), "requests.0.label: infer knows versions only"),
    (requests(release="1"), "requests.0.release is of several tables; for one set version or label"),
    (
        requests(tables=("a", "b"), protocol="json", version="1"),
        "requests.0.version is of one table; for several set release",
    ),
    (requests(ids=IdDistribution(exponent=-1.0)), "requests.0.ids.exponent: expected float >= 0.0, got -1.0"),
    (requests(ids=IdDistribution(kind="hot", num_ids=9)), "requests.0.ids.hot_ids must be below num_ids 9, got 1000"),
    (requests(ids=IdDistribution(hot_share=1.1)), "requests.0.ids.hot_share: expected float <= 1.0, got 1.1"),
    (requests(ids=IdDistribution(kind="replay")), "requests.0.ids.file must name a Parquet file to replay"),
    (requests(ids=IdDistribution(kind="replay", file="x")), "requests.0.ids.file 'x' is not a file"),
    (requests(ids=IdDistribution(time_column="t")), "requests.0.ids.time_column is for kind replay only, kind is zipf"),
    (
        requests(ids=IdDistribution(file=__file__, num_ids=1)),
        "requests.0.ids: file says which ids there are; leave num_ids out",
    ),
    (
        {"mode": "closed"} | requests(ids=CLOCK),
        "requests.0.ids.time_column: requests due at recorded times need mode open, ",
    ),
    (
        {"requests": (RequestSpec(name="a"), RequestSpec(ids=CLOCK))},
        "requests.1.ids.time_column: a recording with a clock must be the only ",
    ),
    (
        requests(ids=CLOCK, batch=Batch(kind="uniform")),
        "requests.0.batch.kind must be fixed where ids.time_column says when ",
    ),
    (requests(batch=Batch(size=0)), "requests.0.batch.size: expected int >= 1, got 0"),
    (
        requests(batch=Batch(kind="uniform", min=9, max=8)),
        "requests.0.batch.min must not be above max, got 9 and 8",
    ),
    (requests(batch=Batch(kind="choice")), "requests.0.batch.sizes is empty: name the sizes to choose from"),
    (requests(batch=Batch(kind="choice", sizes=(1,), weights=(1, 2))), "requests.0.batch.weights: got 2 for 1 sizes; "),
    (events(at=11.0), "events.0.at must lie within the 10 seconds that are measured, got 11"),
    (events(kind="publish", table="item"), "events.0.store is empty, and publish needs it"),
    (events(kind="publish", table="item", store="no"), "events.0.store 'no' is not a folder"),
    (events(kind="signal"), "events.0: signal needs either pid or pid_file"),
    (events(kind="signal", pid=1, signal="KILL"), "events.0.signal must be a signal's name like SIGKILL or SIGSTOP, "),
    (events(kind="command"), "events.0.command is empty, and command needs it"),
    ({"fail_if": ("p99>soon",)}, "fail_if: 'p99>soon'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_run_is_told(fields: dict[str, Any], message: str) -> None:
    """One line names the field and what would be right."""
    with pytest.raises(ScenarioError) as told:
        check(Scenario(**fields))
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)

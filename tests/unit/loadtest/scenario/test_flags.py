"""What the command line asks for: flags become a scenario, a scenario becomes a file, results become files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from loadtest.errors import ScenarioError
from loadtest.report.files import OutputError, Outputs, check_writable, numbered, read_results, write
from loadtest.results.result import Generator, Result
from loadtest.scenario.flags import Flags, effective
from loadtest.scenario.model import Batch, Event, IdDistribution, Phase, RequestSpec, Scenario
from loadtest.scenario.rules import check
from loadtest.scenario.toml import read_scenario, to_toml

MIXED = Scenario(
    name='quotes " and \\ and é \x01 \x7f',
    phases=(Phase(rate=50, warmup=True, seconds=3), Phase(rate=100, rate_to=200, seconds=20), Phase(rate=0)),
    requests=(
        RequestSpec(
            tables=("user",), ids=IdDistribution(kind="hot", hot_share=0.5), batch=Batch(kind="choice", sizes=(1, 2))
        ),
        RequestSpec(tables=("user", "item"), protocol="json", weight=2.5, name="both"),
    ),
    events=(Event(at=1), Event(at=2, kind="command", command=("echo", "a b"))),
    timeout=1e-7,
    fail_if=("p99>10ms",),
)


def test_without_anything_it_is_a_plain_lookup_after_a_warmup() -> None:
    """No file and no flags: the default scenario, with a second of the same load before it."""
    asked = effective(None, (), Flags())
    assert [(phase.seconds, phase.rate, phase.warmup) for phase in asked.phases] == [
        (1.0, 100.0, True),
        (10.0, 100.0, False),
    ]
    assert asked.requests == (RequestSpec(),)


def test_flags_go_before_set_and_set_before_the_file(tmp_path: Path) -> None:
    """Where all three speak of a field, the flag is heard."""
    file = tmp_path / "a.toml"
    file.write_text('url = "http://file"\ntimeout = 1.0\nseed = 1\nfail_if = ["p99>1s"]\n')
    flags = Flags(url="http://flag", tables=("a", "b"), protocol="json", batch=7, zipf=0.5, fail_if=("p50>1s",))
    asked = effective(file, ["url=http://set", "timeout=2", "requests.0.batch.max=9"], flags)
    assert (asked.url, asked.timeout, asked.seed) == ("http://flag", 2.0, 1)
    assert asked.fail_if == ("p99>1s", "p50>1s")
    (spec,) = asked.requests
    assert (spec.tables, spec.protocol) == (("a", "b"), "json")
    assert spec.batch == Batch(kind="fixed", size=7, max=9)
    assert (spec.ids.kind, spec.ids.exponent) == ("zipf", 0.5)
    assert not any(phase.warmup for phase in asked.phases)


def test_rate_and_seconds_keep_the_proportions(tmp_path: Path) -> None:
    """--rate is the highest rate, --seconds the length of all that is measured; the rest follows."""
    file = tmp_path / "a.toml"
    file.write_text(to_toml(MIXED))
    asked = effective(file, (), Flags(rate=1000, seconds=60))
    assert [(phase.seconds, phase.rate, phase.rate_to) for phase in asked.phases] == [
        (3, 250, None),
        (40, 500, 1000),
        (20, 0, None),
    ]
    assert [phase.seconds for phase in effective(file, (), Flags(warmup=0)).phases] == [20, 10]
    assert effective(file, (), Flags(warmup=5)).phases[0] == Phase(name="warm-up", seconds=5, rate=100, warmup=True)


def test_events_keep_their_place_when_seconds_change(tmp_path: Path) -> None:
    """Halfway stays halfway and the end the end, whatever the length; a warm-up moves nothing."""
    events = (Event(at=0), Event(at=15), Event(at=30))
    file = tmp_path / "a.toml"
    file.write_text(to_toml(replace(MIXED, events=events)))
    for seconds in (6.0, 0.7, 90.0):
        asked = effective(file, (), Flags(seconds=seconds, warmup=1))
        assert [event.at for event in asked.events] == pytest.approx([0, seconds / 2, seconds])
        check(asked)
    assert effective(file, (), Flags(warmup=0)).events == events


def test_flags_of_one_request_are_refused_where_there_are_several(tmp_path: Path) -> None:
    """--table could mean any of them: the message says how to be exact."""
    file = tmp_path / "a.toml"
    file.write_text(to_toml(MIXED))
    with pytest.raises(ScenarioError, match=r"this one has 2; use --set, as in --set requests\.0"):
        effective(file, (), Flags(tables=("item",)))


@pytest.mark.parametrize("scenario", [Scenario(), MIXED], ids=["default", "mixed"])
def test_a_printed_scenario_reads_back_equal(scenario: Scenario, tmp_path: Path) -> None:
    """What --print-scenario shows is a file that runs the same test."""
    file = tmp_path / "a.toml"
    file.write_text(to_toml(scenario))
    assert read_scenario(file) == scenario


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """The old content stays until the new is complete, a link stays a link, and no draft is left behind."""
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    check_writable(link)
    assert real.read_text() == "old"
    write(link, "new")
    assert (real.read_text(), link.is_symlink()) == ("new", True)
    with pytest.raises(UnicodeEncodeError):
        write(real, "\ud800")
    assert real.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "real.json"]


def test_a_device_stays_a_device() -> None:
    """--out /dev/null writes into it and does not put a file in its place."""
    check_writable(Path("/dev/null"))
    write(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


def test_where_nothing_can_be_written_is_said_before(tmp_path: Path) -> None:
    """A folder, and a path in a folder that does not exist or is a file, are refused with their name."""
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "a.html", "No such file or directory"),
        (tmp_path / "file" / "a.html", "Not a directory"),
    ):
        with pytest.raises(OutputError, match=reason):
            Outputs(html=path).check()
        with pytest.raises(OutputError, match=f"cannot write {path}"):
            write(path, "")


def test_one_file_that_fails_does_not_keep_the_others_from_being_written(tmp_path: Path) -> None:
    """A disk that refuses one output costs that output; the error is raised after the rest is there."""
    outputs = Outputs(out=tmp_path, hgrm=tmp_path / "a.hgrm")
    with pytest.raises(OutputError, match="cannot write"):
        outputs.write([empty()])
    assert (tmp_path / "a.hgrm").exists()


def test_runs_read_back_equal(tmp_path: Path) -> None:
    """One run or several: reading gives the runs that were written, and reports of several are numbered."""
    for count in (1, 3):
        runs = [empty(number) for number in range(count)]
        Outputs(out=tmp_path / "a.json", hgrm=tmp_path / "a.hgrm").write(runs)
        assert read_results(tmp_path / "a.json") == runs
    assert sorted(path.name for path in tmp_path.glob("*.hgrm")) == ["a.1.hgrm", "a.2.hgrm", "a.3.hgrm", "a.hgrm"]
    assert numbered(Path("x/a.b.html"), 2, 2) == Path("x/a.b.2.html")


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", "7", '{"format": 2}', '{"format": 1}', "\xff"])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    """Files that --out did not write are named in one line."""
    file = tmp_path / "a.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(OutputError, match="is no result of a load test"):
        read_results(file)
    with pytest.raises(OutputError, match="cannot read"):
        read_results(tmp_path / "none.json")


def empty(seed: int = 0) -> Result:
    """A run in which nothing was asked."""
    generator = Generator(engine="httpx", processes=1)
    result = Result(scenario=Scenario(seed=seed), machine={}, began=1.5, seconds=10.0, generator=generator)
    return Result.from_json(json.loads(json.dumps(result.to_json())))

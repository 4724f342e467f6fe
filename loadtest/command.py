"""`embstore loadtest`: the commands, what they print, how they end.

Exit codes: 0 ok, 1 failure (also a --fail-if that holds), 2 usage, 130 interrupted (after the report).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace
from typer.core import TyperGroup

from embstore.common.command_line import run as run_command_line
from embstore.common.render import show

if TYPE_CHECKING:
    from loadtest.report.files import Outputs
    from loadtest.results.result import Result
    from loadtest.run.session import Interrupts
    from loadtest.scenario.model import Scenario

INTERRUPTED = 130


class RunsByDefault(TyperGroup):
    """A group whose command `run` need not be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What begins with neither a command nor --help is for `run`."""
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["run", *args])


loadtest_app = typer.Typer(
    cls=RunsByDefault,
    help="Load-test a running server, without coordinated omission.",
    epilog="`run` need not be named: `embstore loadtest --url http://127.0.0.1:8000 --rate 500`, "
    "`embstore loadtest scenario.toml`. Its options are listed by `embstore loadtest run --help`. Exit codes: 0 ok, "
    "1 failure or a --fail-if that holds, 2 usage, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables for people.")]
OutOption = Annotated[Path | None, typer.Option(help="Write all that was counted, as `compare` and `report` read it.")]
HtmlOption = Annotated[Path | None, typer.Option(help="Write a report with plots, one file that needs no other.")]
HgrmOption = Annotated[Path | None, typer.Option(help="Write the latencies as HdrHistogram's plotter reads them.")]
FailIfOption = Annotated[
    list[str] | None, typer.Option("--fail-if", metavar="COND", help="Exit with 1 if this holds: 'p99>10ms'.")
]


def main() -> None:
    """The commands without the rest of `embstore`: `python -m loadtest`."""
    run_command_line(loadtest_app, "python -m loadtest")


@loadtest_app.command()
def run(
    scenario: Annotated[Path | None, typer.Argument(help="TOML file; without it a plain lookup of one table.")] = None,
    url: Annotated[str | None, typer.Option(help="The server. Default http://127.0.0.1:8000.")] = None,
    table: Annotated[list[str] | None, typer.Option(help="Table to look up; several: all in one request.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, at the highest. Default 100.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds that are measured. Default 10.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Seconds before that. Default 1, or as in the file.")] = None,
    batch: Annotated[int | None, typer.Option(help="Ids in a request. Default 100.")] = None,
    protocol: Annotated[str | None, typer.Option(help="octet, json or infer. Default octet.")] = None,
    zipf: Annotated[float | None, typer.Option(help="Exponent of the ids' distribution; 0: uniform.")] = None,
    engine: Annotated[str | None, typer.Option(help="httpx or raw. Default httpx.")] = None,
    processes: Annotated[int | None, typer.Option(help="Generator processes. Default 1.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field: --set phases.0.rate=500.")
    ] = None,
    print_scenario: Annotated[bool, typer.Option("--print-scenario", help="Show what would run, as TOML.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First measure what the generator itself can do.")
    ] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Make the run so many times, each with another seed.")] = 1,
    find_max: Annotated[bool, typer.Option("--find-max", help="Search for the highest rate that meets --slo.")] = False,
    slo: Annotated[
        list[str] | None, typer.Option("--slo", metavar="COND", help="With --find-max: 'p99<10ms'; may be repeated.")
    ] = None,
    fail_if: FailIfOption = None,
    out: OutOption = None,
    html: HtmlOption = None,
    hgrm: HgrmOption = None,
    json: JsonOption = False,
) -> None:
    """Run a load test and report it. Flags override --set, and --set overrides the file."""
    from loadtest.errors import ScenarioError
    from loadtest.report.files import Outputs
    from loadtest.run.session import interrupts
    from loadtest.scenario.flags import Flags, effective
    from loadtest.scenario.rules import check
    from loadtest.scenario.toml import to_toml

    with _readable_errors():
        flags = Flags(
            url=url,
            tables=table or (),
            rate=rate,
            seconds=seconds,
            warmup=warmup,
            batch=batch,
            protocol=protocol,
            zipf=zipf,
            engine=engine,
            processes=processes,
            fail_if=fail_if or (),
        )
        made = effective(scenario, set_ or (), flags)
        check(made)
        if print_scenario:
            sys.stdout.write(to_toml(made))
            return
        outputs = Outputs(out=out, html=html, hgrm=hgrm)
        outputs.check()
        if bool(slo) != find_max:
            raise ScenarioError("--find-max and --slo go together: --find-max --slo 'p99<10ms'")
        if find_max and (html or hgrm or repeat > 1 or made.fail_if):
            raise ScenarioError(
                "--find-max has runs of its own, judged by --slo: leave out --html, --hgrm, --repeat "
                "and conditions to fail"
            )
        with interrupts() as interrupt:
            if find_max:
                code = _search(made, slo or (), interrupt, out, json)
            else:
                code = _run(made, interrupt, repeat, calibrate, outputs, json)
        raise typer.Exit(code)


def _run(scenario: Scenario, interrupt: Interrupts, repeat: int, calibrate: bool, outputs: Outputs, json: bool) -> int:
    """Run it so many times and report what there is, also when a run fails; the exit code."""
    from loadtest.errors import LoadError
    from loadtest.report.live import make_live
    from loadtest.run.session import load_test
    from loadtest.scenario.target import list_tables

    num_ids = list_tables(scenario)
    ceiling = _ceiling(scenario, num_ids, json) if calibrate else 0.0
    results: list[Result] = []
    failure = ""
    with interrupt.held():
        for turn in range(repeat):
            seeded = replace(scenario, seed=scenario.seed + turn * scenario.processes)
            try:
                with make_live(seeded, silent=json) as live:
                    results.append(
                        load_test(seeded, stop=interrupt.stop, num_ids=num_ids, ceiling=ceiling, on_progress=live)
                    )
            except LoadError as error:
                if not results:
                    raise
                failure = f"run {turn + 1} of {repeat} failed: {error}"
            if failure or interrupt.stop.is_set():
                break
        _write_and_show(results, outputs, json)
        if interrupt.stop.is_set():
            return INTERRUPTED
        return _say(failure) if failure else _judge(results)


def _search(scenario: Scenario, slo: Sequence[str], interrupt: Interrupts, out: Path | None, json: bool) -> int:
    """Search for the highest rate and report it; the exit code."""
    from json import dumps

    from loadtest.report.files import write
    from loadtest.report.live import make_live
    from loadtest.report.terminal import searched
    from loadtest.run.session import load_test
    from loadtest.scenario.conditions import parse
    from loadtest.scenario.target import list_tables
    from loadtest.search.find_max import Limits, find_max, peak_rate, whole_slo
    from loadtest.search.outcome import Trial

    conditions = whole_slo([parse(text) for text in slo])
    peak_rate(scenario)
    num_ids = list_tables(scenario)
    ceiling = _ceiling(scenario, num_ids, json)

    def run_once(at: Scenario) -> Result:
        with make_live(at, silent=json) as live:
            return load_test(at, stop=interrupt.stop, num_ids=num_ids, ceiling=ceiling, on_progress=live)

    def tell(tried: Trial) -> None:
        why = tried.reason if tried.verdict == "invalid" else ", ".join(tried.figures)
        _note(f"{tried.rate:,.1f} requests/s: {tried.verdict}, {why}", json)

    with interrupt.held():
        found = find_max(scenario, conditions, run=run_once, pause=interrupt.stop.wait, limits=Limits(), on_tried=tell)
        value = found.to_json() | {"ceiling": ceiling, "scenario": scenario.to_json()}
        try:
            if out is not None:
                write(out, dumps(value) + "\n")
        finally:
            show(json, value, lambda: searched(found))
    if found.limit == "interrupted":
        return INTERRUPTED
    if found.limit in ("runs", "failed"):
        return _say(found.note)
    return 0 if found.low else 1


@loadtest_app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A file that --out wrote.")],
    after: Annotated[Path, typer.Argument(help="Another, of the same load.")],
    force: Annotated[
        bool, typer.Option("--force", help="Compare although the loads differ, or runs are invalid.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say what changed from one run, or several of --repeat, to others, and how sure that is."""
    from loadtest.report.files import read_results
    from loadtest.report.terminal import compared
    from loadtest.results.compare import CompareError, compare_runs

    with _readable_errors():
        try:
            found = compare_runs(read_results(before), read_results(after), force=force)
        except CompareError as error:
            raise typer.Exit(_say(str(error))) from None
        show(json, found.to_json(), lambda: compared(found))


@loadtest_app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A file that --out wrote.")],
    html: HtmlOption = None,
    hgrm: HgrmOption = None,
    fail_if: FailIfOption = None,
    json: JsonOption = False,
) -> None:
    """Report a run again, from its file."""
    from loadtest.report.files import Outputs, read_results
    from loadtest.scenario.conditions import parse

    with _readable_errors():
        outputs = Outputs(html=html, hgrm=hgrm)
        outputs.check()
        results = read_results(file)
        for result in results:
            conditions = (*result.scenario.fail_if, *(str(parse(text)) for text in fail_if or ()))
            result.scenario = replace(result.scenario, fail_if=conditions)
        _write_and_show(results, outputs, json)
        raise typer.Exit(_judge(results))


def _ceiling(scenario: Scenario, num_ids: Mapping[str, int], json: bool) -> float:
    from loadtest.run.calibrate import calibrate

    _note("calibrating: what the generator can do on a server that does nothing", json)
    found = calibrate(scenario, num_ids=num_ids)
    _note(f"at most {found.ceiling:,.0f} requests/s, at least {found.floor_us:,.0f} us each", json)
    return found.ceiling


def _judge(results: Sequence[Result]) -> int:
    """1 when a condition holds in most runs that are valid, or would if late generators were not the reason of it, or
    when too few are valid."""
    from loadtest.results.figures import figure
    from loadtest.results.validity import decides, only_generator_lag
    from loadtest.scenario.conditions import parse

    code = 0
    sound = [result for result in results if not result.invalid or only_generator_lag(result)]
    for condition in map(parse, results[0].scenario.fail_if):
        held: list[float] = []
        unsure: list[Result] = []
        for result in sound:
            value = figure(condition, result.total(), result.seconds)
            if not decides(result, condition, value):
                unsure.append(result)
            elif condition.met_by(value):
                held.append(value)
        enough = 2 * len(sound) > len(results)
        if enough and 2 * len(held) > len(sound):
            of = f" in {len(held)} of {len(sound)} runs" if len(sound) > 1 else ""
            code = _say(f"failed, because {condition} holds{of}: {condition.describe(held[0])}")
        elif enough and 2 * (len(held) + len(unsure)) > len(sound):
            of = f" in {len(held) + len(unsure)} of {len(sound)} runs" if len(sound) > 1 else ""
            code = _say(f"{condition} may hold{of}: {unsure[0].invalid[0]}")
        elif not enough:
            spoilt = [result for result in results if result.invalid]
            which = "the run is" if len(results) == 1 else f"{len(spoilt)} of {len(results)} runs are"
            code = _say(f"{which} invalid, so that {condition} says nothing: {spoilt[0].invalid[0]}")
    if not any(result.total().ok for result in results):
        code = _say("failed: no request got a 2xx reply")
    return code


def _write_and_show(results: Sequence[Result], outputs: Outputs, json: bool) -> None:
    """The files first: stdout may be a pipe that nobody reads."""
    try:
        outputs.write(results)
    finally:
        _show_runs(results, json)


def _show_runs(results: Sequence[Result], json: bool) -> None:
    from loadtest.results.summary import to_summary

    def tables() -> Any:
        from rich.console import Group

        from loadtest.report.terminal import report

        return Group(*(report(result) for result in results))

    found = [to_summary(result) for result in results]
    show(json, found if len(found) != 1 else found[0], tables)


def _note(message: str, json: bool) -> None:
    """A line about how it goes; nothing for programs."""
    if not json:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


def _say(message: str, code: int = 1) -> int:
    """A line about what went wrong; the exit code."""
    sys.stderr.write(f"embstore: {' '.join(message.split())}\n")
    return code


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors that people can do something about are one line and an exit code."""
    from loadtest.errors import LoadError, ScenarioError
    from loadtest.report.files import OutputError
    from loadtest.scenario.conditions import ConditionError

    try:
        yield
    except (ScenarioError, ConditionError) as error:
        raise typer.Exit(_say(str(error), 2)) from None
    except (LoadError, OutputError) as error:
        raise typer.Exit(_say(str(error))) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None

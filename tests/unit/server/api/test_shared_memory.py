"""Regions of shared memory without a server: what may be registered, where tensors may be, what nobody can break."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embstore.errors import BadRequest, Conflict, EmbstoreError, Forbidden, NotFound, Unprocessable
from server.api import shared_memory
from server.api.places import Place, place_of
from server.api.shared_memory import MAX_NAME_BYTES, Access, Regions
from server.api.shared_objects import FOLDER, check_apart
from server.http.auth import ApiKeys

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")
HERE = {b"host": b"127.0.0.1"}
KEYS = ApiKeys([], [], host="127.0.0.1")
SIZE = 4096


@pytest.fixture
def path() -> Iterator[Path]:
    """A shared memory object of 4,096 bytes, all of them 7."""
    path = FOLDER / f"embstore-test-{secrets.token_hex(6)}"
    path.write_bytes(b"\7" * SIZE)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(params=["alone", "together"])
def regions(request: pytest.FixtureRequest, tmp_path: Path) -> Regions:
    """No region yet, of a process by itself and of one of several."""
    return Regions(KEYS, 1 << 20, tmp_path if request.param == "together" else None)


def test_a_region_is_read_and_written_where_it_was_registered(regions: Regions, path: Path) -> None:
    """Offsets add up: of the region in its object, and of the tensor in its region."""
    regions.register("a", f"/{path.name}", 100, 200)
    window = regions.find(Place("a", 10, 5), "input 'x'")
    window.write(b"hello")
    assert (window.read(), path.read_bytes()[108:117]) == (b"hello", b"\7\7hello\7\7")
    assert regions.registered()["a"].offset == 100
    regions.unregister("a")
    with pytest.raises(NotFound, match="input 'x': no shared memory region named 'a'"):
        regions.find(Place("a", 0, 1), "input 'x'")
    assert window.read() == b"hello", "a request under way keeps the object"


@pytest.mark.parametrize("key", ["{}", "/{}", "//{}"])
def test_a_key_has_slashes_before_it_or_none(regions: Regions, path: Path, key: str) -> None:
    """Keys are names as shm_open takes them."""
    regions.register("a", key.format(path.name), 0, SIZE)
    assert regions.find(Place("a", 0, 1), "").read() == b"\7"


@pytest.mark.parametrize("key", ["", "/", ".", "/..", "../etc/passwd", "a/b", "/a/../b", "a\0b", "x" * 256, "/" * 300])
def test_a_key_is_one_name(regions: Regions, key: str) -> None:
    """Nothing outside the folder of shared memory objects can be named."""
    with pytest.raises(BadRequest, match=r"key '.*(names no shared memory object|has more than 255 bytes)"):
        regions.register("a", key, 0, 1)


def test_only_shared_memory_objects_are_opened(regions: Regions, path: Path, tmp_path: Path) -> None:
    """Symbolic links, pipes and folders are refused, at once; what is not there is not found."""
    (tmp_path / "secret").write_bytes(bytes(SIZE))
    makers: dict[str, Any] = {
        "cannot be opened: Too many levels of symbolic links": lambda: path.symlink_to(tmp_path / "secret"),
        "is not a shared memory object": lambda: os.mkfifo(path),
        "cannot be opened: Is a directory": path.mkdir,
    }
    for why, make in makers.items():
        path.unlink()
        make()
        with pytest.raises(Unprocessable, match=why):
            regions.register("a", path.name, 0, 1)
        if path.is_dir():
            path.rmdir()
    with pytest.raises(NotFound, match="there is no shared memory object"):
        regions.register("a", path.name, 0, 1)
    assert regions.registered() == {}


@pytest.mark.parametrize(
    ("offset", "size", "error"),
    [
        (0, 0, BadRequest),
        (-1, 1, BadRequest),
        (0, -1, BadRequest),
        (0, SIZE + 1, Unprocessable),
        (SIZE, 1, Unprocessable),
        (1 << 63, 1, Unprocessable),
        ((1 << 64) - 8, 16, Unprocessable),
        (8, (1 << 64) - 8, Unprocessable),
        (10**4000, 1, Unprocessable),
    ],
)
def test_a_region_lies_inside_its_object(
    regions: Regions, path: Path, offset: int, size: int, error: type[EmbstoreError]
) -> None:
    """Whatever numbers are sent, also such as would overflow."""
    with pytest.raises(error):
        regions.register("a", path.name, offset, size)
    assert regions.registered() == {}


@pytest.mark.parametrize(
    "name", ["", "x" * (MAX_NAME_BYTES + 1), "é" * (MAX_NAME_BYTES // 2 + 1), "a\0", "a\n", "\ud800"]
)
def test_names_are_short_and_printable(regions: Regions, path: Path, name: str) -> None:
    """A name that cannot be shown, or is too long, is refused."""
    with pytest.raises(BadRequest, match="the name of a region"):
        regions.register(name, path.name, 0, 1)


@pytest.mark.parametrize("name", [".", "..", "a b", "%2F", "é", "x" * MAX_NAME_BYTES, "a/b"])
def test_a_name_means_nothing_to_the_server(regions: Regions, path: Path, name: str) -> None:
    """Names that would be something else in a path are names like others."""
    regions.register(name, path.name, 0, 1)
    assert list(regions.registered()) == [name]
    assert regions.find(Place(name, 0, 1), "").read() == b"\7"


def test_a_name_is_registered_once(regions: Regions, path: Path) -> None:
    """A name that exists is a conflict, the same region or another; unregistered it can be had again."""
    regions.register("a", path.name, 0, 8)
    for size in (8, 16):
        with pytest.raises(Conflict, match="'a' is registered already"):
            regions.register("a", path.name, 0, size)
    regions.unregister("nobody")
    regions.unregister("a")
    regions.register("a", path.name, 0, 16)
    assert regions.registered()["a"].byte_size == 16


def test_regions_and_their_bytes_are_limited(regions: Regions, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of regions, and the sum of their sizes."""
    regions.max_bytes = 2 * SIZE
    regions.register("a", path.name, 0, SIZE)
    regions.register("b", path.name, 0, SIZE - 1)
    with pytest.raises(Conflict, match="8,193 bytes together; the limit is 8,192"):
        regions.register("c", path.name, 0, 2)
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 2)
    with pytest.raises(Conflict, match="2 shared memory regions are registered"):
        regions.register("c", path.name, 0, 1)
    regions.unregister()
    assert regions.registered() == {}
    regions.register("c", path.name, 0, SIZE)


@pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (101, 0), ((1 << 63) - 1, 1 << 62)])
def test_a_tensor_lies_inside_its_region(regions: Regions, path: Path, offset: int, size: int) -> None:
    """Not only inside the object."""
    regions.register("a", path.name, 0, 100)
    with pytest.raises(BadRequest, match="are outside region 'a', which has 100"):
        regions.find(Place("a", offset, size), "input 'x'")


@pytest.mark.parametrize(
    "parameters",
    [
        {"shared_memory_region": "a"},
        {"shared_memory_byte_size": 8},
        {"shared_memory_region": 1, "shared_memory_byte_size": 8},
        {"shared_memory_region": "a", "shared_memory_byte_size": -8},
        {"shared_memory_region": "a", "shared_memory_byte_size": True},
        {"shared_memory_region": "a", "shared_memory_byte_size": 8.0},
        {"shared_memory_region": "a", "shared_memory_byte_size": 1 << 63},
        {"shared_memory_region": "a", "shared_memory_byte_size": 8, "shared_memory_offset": -1},
        {"shared_memory_region": "a", "shared_memory_byte_size": 8, "shared_memory_offset": None},
    ],
)
def test_parameters_that_say_half_or_nonsense_are_refused(parameters: dict[str, Any]) -> None:
    """A region and a size belong together, and both are what they should be."""
    with pytest.raises(BadRequest, match=r"input 'x': shared_memory_(region|byte_size) needs"):
        place_of(parameters, "input 'x'")


def test_outputs_do_not_overlap(regions: Regions, path: Path) -> None:
    """Neither in one region nor by two names of the same memory; side by side they may be."""
    regions.register("a", path.name, 0, 100)
    regions.register("b", path.name, 50, 100)

    def windows(*places: Place) -> Any:
        return [regions.find(place, f"output {i}") for i, place in enumerate(places)]

    check_apart(windows(Place("a", 0, 50), Place("b", 0, 50), Place("a", 20, 0)))
    for places in ((Place("a", 0, 50), Place("a", 49, 1)), (Place("b", 0, 50), Place("a", 40, 11))):
        with pytest.raises(BadRequest, match=r"output \d and output \d overlap"):
            check_apart(windows(*places))


def test_an_object_that_was_truncated_is_an_error(regions: Regions, path: Path) -> None:
    """Reading and writing it kill nobody, and writing does not lengthen it."""
    regions.register("a", path.name, 0, SIZE)
    window = regions.find(Place("a", 0, SIZE), "output 'x'")
    os.truncate(path, 100)
    for use in (window.read, lambda: window.check_room(101)):
        with pytest.raises(Unprocessable, match="output 'x': its shared memory object was truncated"):
            use()
    window.check_room(100)
    assert path.stat().st_size == 100


def test_processes_that_share_a_folder_have_the_same_regions(tmp_path: Path, path: Path) -> None:
    """What one registers the other uses, a name is taken for both, and what one unregisters is gone for both."""
    one, other = (Regions(KEYS, 1 << 20, tmp_path / "control") for _ in range(2))
    one.register("a", path.name, 0, SIZE)
    assert other.registered() == one.registered()
    assert other.find(Place("a", 0, 2), "").read() == b"\7\7"
    with pytest.raises(Conflict):
        other.register("a", path.name, 0, 1)
    one.unregister("a")
    with pytest.raises(NotFound):
        other.find(Place("a", 0, 2), "")


def test_another_object_of_the_same_key_is_not_the_one_registered(tmp_path: Path, path: Path) -> None:
    """A process that has not opened a region yet finds out that its key means something else by now."""
    one, other = (Regions(KEYS, 1 << 20, tmp_path / "control") for _ in range(2))
    one.register("a", path.name, 0, SIZE)
    path.rename(f"{path}-old")
    path.write_bytes(bytes(SIZE))
    try:
        with pytest.raises(Conflict, match="is another than when it was registered"):
            other.find(Place("a", 0, 2), "")
        assert one.find(Place("a", 0, 2), "").read() == b"\7\7"
    finally:
        Path(f"{path}-old").unlink()


def test_what_is_unregistered_is_closed_everywhere(tmp_path: Path, path: Path) -> None:
    """Each process lets go of the object, so that its memory is free once its owner removes it."""
    one, other = (Regions(KEYS, 1 << 20, tmp_path / "control") for _ in range(2))

    def num_open() -> int:
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(path.name in link for link in links)

    one.register("a", path.name, 0, SIZE)
    assert num_open() == 1
    other.find(Place("a", 0, 1), "")
    assert num_open() == 2
    one.unregister()
    assert num_open() == 1
    other.sweep()
    assert num_open() == 0


@pytest.mark.parametrize(
    ("host", "max_bytes", "headers"),
    [
        ("0.0.0.0", 1, HERE),
        ("127.0.0.1", 0, HERE),
        ("127.0.0.1", 1, {b"host": b"evil.example"}),
        ("127.0.0.1", 1, HERE | {b"origin": b"http://evil.example"}),
        ("127.0.0.1", 1, HERE | {b"x-forwarded-for": b"10.0.0.1"}),
    ],
)
def test_only_callers_of_this_machine_use_its_memory(host: str, max_bytes: int, headers: dict[bytes, bytes]) -> None:
    """Not where the server listens beyond loopback or is told not to, not through proxies, not from web pages."""
    access = Access(Regions(ApiKeys([], [], host=host), max_bytes), headers, 100)
    with pytest.raises(Forbidden, match="shared memory is"):
        access.find(Place("a", 0, 1), "")
    Regions(KEYS, 1).check_caller(HERE)

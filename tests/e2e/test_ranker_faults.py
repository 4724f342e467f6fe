"""The ranking service while the embedding service is gone, slow or another one; and requests that are wrong."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from ranker.artifact import DESCRIPTION, TENSORS, Artifact, ArtifactError, Side, load, save
from ranker.model import Scorer, rank
from ranker.remote import SKEWED, Remote
from ranker.settings import Settings, SettingsError, read_settings
from support.ranking import RankerProcess, ranking
from support.serving import ServerProcess

from embstore.publish.publication import Publication
from embstore.publish.store import Store

USERS = [7, 8, 9, 2**62]
ITEMS = [f"sku-{n:03d}" for n in range(100)]
WIDTH = 8
DEADLINE_S = 1.5
REQUEST = {"user": 7, "candidates": ITEMS[:50], "top": 5}


def publication(seed: int) -> dict[str, Publication]:
    """Random vectors of USERS and ITEMS."""
    draw = np.random.default_rng(seed)
    return {
        name: Publication(draw.normal(size=(len(keys), WIDTH)).astype(np.float32), ids=keys)
        for name, keys in (("user", USERS), ("item", ITEMS))
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one release, labelled."""
    store = Store(tmp_path_factory.mktemp("ranker-faults") / "store")
    release = store.publish_release(publication(1))
    for table, version in release.tables.items():
        store.set_label(table, "ranker", version, release=release.id)
    return store


@pytest.fixture(scope="module")
def artifact(store: Store) -> Artifact:
    """A ranker of release 1 whose weights are random."""

    def side(name: str, keys: Any, kind: Any) -> Side:
        vectors_ND = torch.from_numpy(store.load(name, 1).lookup(keys))
        return Side(name, 1, kind, keys[:2], vectors_ND[:2], vectors_ND.mean(dim=0))

    torch.manual_seed(0)
    scorer = Scorer(WIDTH, 4)
    torch.nn.init.normal_(scorer.correction.weight)
    made = Artifact("1", side("user", USERS, "int64"), side("item", ITEMS, "string"), scorer)
    save(made, store.root.parent / "artifact")
    return made


class Embeddings:
    """An embedding service of the store at one address, which can be killed and started again."""

    def __init__(self, store: Store) -> None:
        self.store, self.port, self.num_starts = store, 0, 0
        self.start()

    def start(self) -> None:
        """Start it, on the port it had."""
        self.num_starts += 1
        log = self.store.root.parent / f"server-{self.num_starts}.log"
        self.server = ServerProcess(self.store.root, log, keep_versions=1, port=self.port)
        self.port = int(self.server.url.rpartition(":")[2])

    def kill(self) -> None:
        """End it as a power cut would."""
        self.server.process.kill()
        self.server.process.wait(30)


@pytest.fixture(scope="module")
def embeddings(store: Store) -> Iterator[Embeddings]:
    """The embedding service."""
    running = Embeddings(store)
    try:
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def ranker(embeddings: Embeddings, artifact: Artifact, store: Store) -> Iterator[RankerProcess]:
    """A ranker that was ready once."""
    folder = store.root.parent
    with ranking(
        folder / "artifact", embeddings.server.url, folder / "ranker.log", deadline_ms=DEADLINE_S * 1000
    ) as running:
        running.wait_ready()
        yield running


def ask(ranker: RankerProcess, request: dict[str, Any] = REQUEST) -> dict[str, Any]:
    """The answer to a ranking, which is always a 200."""
    reply = httpx.post(f"{ranker.url}/rank", json=request, timeout=60)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def counted(ranker: RankerProcess, series: str) -> float:
    """A number on /metrics."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", ranker.get("/metrics").text, re.MULTILINE)
    assert found, series
    return float(found[1])


def expected(store: Store, artifact: Artifact, user_D: torch.Tensor, candidates: list[str]) -> list[dict[str, Any]]:
    """The ranking by the store's own vectors, zeros of unknown items replaced by the default."""
    vectors_CD, found_C = store.load("item", 1).lookup(candidates, return_found=True)
    vectors_CD[~found_C] = artifact.item.default_D.numpy()
    order, scores = rank(artifact.scorer, user_D, torch.from_numpy(vectors_CD), 5)
    return [{"id": candidates[place], "score": score} for place, score in zip(order, scores, strict=True)]


def test_killed_and_restarted_under_load(ranker: RankerProcess, embeddings: Embeddings) -> None:
    """While the embedding service is killed and started again every answer is a 200 that says what it is worth."""
    whole = ask(ranker)
    before = counted(ranker, 'ranker_rankings_total{degraded="yes"}')
    answers: list[dict[str, Any]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.wait(0.01):
            answers.append(ask(ranker))

    def seen(degraded: bool, since: int = 0) -> bool:
        return any(answer["degraded"] is degraded for answer in answers[since:])

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load) for _ in range(2)]
        try:
            ranker.wait_until(lambda: seen(False), "an answer")
            embeddings.kill()
            ranker.wait_until(lambda: seen(True), "a degraded answer")
            readiness = ranker.get("/readyz").status_code
            embeddings.start()
            embeddings.server.wait_ready()
            restarted = len(answers)
            ranker.wait_until(lambda: seen(False, restarted), "a whole answer")
        finally:
            stop.set()
    for done in loads:
        done.result()
    degraded = [answer for answer in answers if answer["degraded"]]
    assert all(answer == whole for answer in answers if not answer["degraded"])
    assert {answer["reason"] for answer in degraded} <= {"unreachable", "unavailable", "timeout", "release_not_served"}
    assert all([item["id"] for item in answer["items"]] == ITEMS[:5] for answer in degraded)
    assert counted(ranker, 'ranker_rankings_total{degraded="yes"}') - before == len(degraded)
    assert readiness == 200  # it goes on answering, and every other replica would do no better


def test_stalled(ranker: RankerProcess, embeddings: Embeddings) -> None:
    """An embedding service that takes requests and answers none costs the deadline, and then rankings go without it."""
    whole = ask(ranker)
    before = counted(ranker, 'ranker_degraded_total{reason="timeout"}')
    embeddings.server.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        answer = ask(ranker, REQUEST | {"candidates": [ITEMS[2], ITEMS[0], ITEMS[2], ITEMS[1]]})
        seconds = time.monotonic() - began
    finally:
        embeddings.server.process.send_signal(signal.SIGCONT)
    assert (answer["degraded"], answer["reason"]) == (True, "timeout")
    assert [item["id"] for item in answer["items"]] == [ITEMS[2], ITEMS[0], ITEMS[1]]
    assert DEADLINE_S * 0.9 <= seconds < DEADLINE_S + 8
    assert counted(ranker, 'ranker_degraded_total{reason="timeout"}') - before == 1
    ranker.wait_until(lambda: ask(ranker) == whole, "the answer from before")


def test_a_release_that_is_gone_fails_readiness(ranker: RankerProcess, store: Store) -> None:
    """When the pinned release is served no more, readiness says so and rankings are degraded; it comes back with it."""
    whole, pinned = ask(ranker), store.release("1").tables
    newer = store.publish_release(publication(2))
    for table in pinned:
        store.set_label(table, "ranker", newer.tables[table], release=newer.id)
    ranker.wait_until(lambda: ranker.get("/readyz").status_code == 503, "the end of readiness")
    body = ranker.get("/readyz").json()
    assert (body["status"], body["release"]) == ("not ready", "1")
    assert "release 1 is not served by http://127.0.0.1" in body["reasons"][0]
    assert ask(ranker)["reason"] == "release_not_served"
    assert counted(ranker, 'ranker_release_served{release="1"}') == 0
    for table, version in pinned.items():
        store.set_label(table, "ranker", version, release="1")
    ranker.wait_ready()
    ranker.wait_until(lambda: ask(ranker) == whole, "the answer from before")


def test_another_release_of_the_same_number(embeddings: Embeddings, artifact: Artifact) -> None:
    """A release with the right number and other vectors, as of a store made anew, is not ranked by."""

    async def looked_at() -> tuple[str | None, str | None]:
        other = replace(artifact, item=replace(artifact.item, golden_GD=artifact.item.golden_GD + 1))
        remote = Remote(other, Settings(embeddings=embeddings.server.url, deadline_ms=20_000))
        try:
            await remote.probe()
            return remote.problem, (await remote.vectors(7, ITEMS[:3])).degraded
        finally:
            await remote.close()

    embeddings.server.wait_ready()
    problem, degraded = asyncio.run(looked_at())
    assert problem is not None
    assert "has other vectors in item than this ranker was trained with" in problem
    assert degraded == SKEWED


def test_unknown_ids_get_default_vectors(ranker: RankerProcess, store: Store, artifact: Artifact) -> None:
    """An unknown user and unknown items rank by the default vectors, are told apart in the answer and counted."""
    series = [f'ranker_ids_total{{known="no",side="{side}"}}' for side in ("user", "item")]
    before = [counted(ranker, one) for one in series]
    candidates = ["nobody", *ITEMS[:9], "nothing"]
    answer = ask(ranker, {"user": 10, "candidates": candidates, "top": 5})
    assert not answer["degraded"]
    assert (answer["unknown_user"], answer["num_unknown_items"]) == (True, 2)
    assert answer["items"] == expected(store, artifact, artifact.user.default_D, candidates)
    assert [counted(ranker, one) for one in series] == [before[0] + 1, before[1] + 2]


def test_ids_are_what_they_mean(ranker: RankerProcess) -> None:
    """Duplicates are ranked once, a number may be a string of digits, fewer candidates than `top` are all returned."""
    once = ask(ranker, {"user": 2**62, "candidates": ITEMS[:4], "top": 9})
    assert ask(ranker, {"user": str(2**62), "candidates": ITEMS[:4] + ITEMS[2:3] * 5, "top": 9}) == once
    assert sorted(item["id"] for item in once["items"]) == ITEMS[:4]
    assert ask(ranker, {"user": 7, "candidates": []})["items"] == []


WRONG = {
    "not json": (b"{", 400, "the body is not JSON"),
    "no body": (b"", 422, "the body: field required"),
    "not an object": (b"[]", 422, "the body: input should be a valid"),
    "no candidates": ({"user": 7}, 422, "candidates: field required"),
    "a float": ({"user": 7, "candidates": ["a", 1.5]}, 422, "candidates[1]: an id is a whole number or a string"),
    "a bool": ({"user": True, "candidates": []}, 422, "user: an id is a whole number or a string, got True"),
    "not text": (b'{"user": 7, "candidates": ["\\ud800"]}', 422, "candidates[0]: an id has at most 1,024 characters"),
    "beyond int64": ({"user": 2**63, "candidates": []}, 422, "user: ids of users fit 64 bits"),
    "not digits": ({"user": "1_0", "candidates": []}, 422, "user: ids of users are whole numbers, got '1_0'"),
    "a number": ({"user": 7, "candidates": [3]}, 422, "candidates[0]: ids of items are strings, got the number 3"),
    "top of none": (REQUEST | {"top": 0}, 422, "top: input should be greater than or equal to 1"),
    "a typo": (REQUEST | {"topp": 5}, 422, "topp: extra inputs are not permitted"),
    "too many": ({"user": 7, "candidates": ["a"] * 501}, 413, "501 candidates, but a request may have 500"),
    "too large": (b" " * (1 << 20) + b"{}", 413, "the body may have 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_problems(ranker: RankerProcess, case: str) -> None:
    """What cannot be ranked is refused as problem+json that names the place, and counted."""
    sent, status, detail = WRONG[case]
    body = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    before = counted(ranker, "ranker_refused_total")
    reply = httpx.post(f"{ranker.url}/rank", content=body, headers={"content-type": "application/json"}, timeout=60)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json")
    assert reply.json()["status"] == status
    assert detail in reply.json()["detail"]
    assert counted(ranker, "ranker_refused_total") == before + 1


def test_damaged_artifacts_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    """An artifact that is not there, of another format, or whose files do not belong together never serves."""
    with pytest.raises(ArtifactError, match="No such file"):
        load(tmp_path / "nowhere")
    for name, old, new, message in (
        (DESCRIPTION, b"{", b"", "not JSON"),
        (DESCRIPTION, b'"hidden"', b'"hiddn"', "not a ranker's artifact: KeyError"),
        (DESCRIPTION, b'"format": 1', b'"format": 2', "this program reads 1"),
        (TENSORS, b"F32", b"F16", "is damaged"),
    ):
        save(artifact, tmp_path)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(old, new, 1))
        with pytest.raises(ArtifactError, match=message):
            load(tmp_path)
    save(replace(artifact, user=replace(artifact.user, default_D=torch.full((WIDTH,), torch.nan))), tmp_path)
    with pytest.raises(ArtifactError, match=r"user.default has numbers that are not finite"):
        load(tmp_path)


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags win over the environment, and a wrong setting is named."""
    monkeypatch.setenv("RANKER_DEADLINE_MS", "80")
    monkeypatch.setenv("RANKER_PORT", "8200")
    settings = read_settings(port=8300, host=None)
    assert (settings.deadline_ms, settings.port, settings.host) == (80, 8300, "127.0.0.1")
    with pytest.raises(SettingsError, match="deadline_ms: input should be greater than 0"):
        read_settings(deadline_ms=0)

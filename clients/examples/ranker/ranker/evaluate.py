"""Measures a running service: the lists that training was tested by, ranked over HTTP, by the same measure."""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from embstore.train.evaluate import Metrics
from ranker.artifact import ArtifactError, Key
from ranker.lists import CandidateList, evaluate

TIMEOUT_S = 30.0


def over_http(url: str, lists: Sequence[CandidateList[Key]], release: str, cutoff: int) -> Metrics:
    """The metrics of the service at `url`; ArtifactError when an answer is not of the release, or is degraded."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:

        def best(one: CandidateList[Key]) -> list[Key]:
            asked = {"user": one.user, "candidates": one.candidates, "top": cutoff}
            reply = client.post("/rank", json=asked).raise_for_status().json()
            if reply["degraded"]:
                raise ArtifactError(f"user {one.user!r}: the answer is degraded ({reply['reason']}), not a ranking")
            if reply["release"] != release:
                raise ArtifactError(f"the service ranks by release {reply['release']}, the lists are of {release}")
            return [item["id"] for item in reply["items"]]

        return evaluate(lists, best, cutoff)

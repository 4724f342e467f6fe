"""Calls of the Open Inference Protocol's system shared memory extension: listing, adding and removing regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from embstore.errors import BadRequest, NotFound
from server.api.labels import MAX_BYTES
from server.api.schemas import body, problems
from server.api.shared_memory import Region, Regions
from server.http.body import read_body
from server.http.problems import clip


class Registration(msgspec.Struct):
    """A range of bytes of the shared memory object `key`, which is named as for shm_open."""

    key: str
    byte_size: int
    offset: int = 0


@dataclass
class SharedMemoryRegion:
    """A registered region: `byte_size` bytes of a shared memory object, from `offset` on."""

    name: str
    key: str
    offset: int
    byte_size: int

    @classmethod
    def of(cls, name: str, region: Region) -> SharedMemoryRegion:
        """A region as the protocol lists it."""
        return cls(name, region.key, region.offset, region.byte_size)


class RegionsChanged(BaseModel):
    """An empty object: the change is made."""


def shared_memory_router(regions: Regions) -> APIRouter:
    """Everything under /v2/systemsharedmemory: for callers that may look up, and are on this machine."""

    def check_caller(request: Request) -> None:
        regions.check_caller(dict(request.scope["headers"]))

    router = APIRouter(prefix="/v2/systemsharedmemory", tags=["open inference"], dependencies=[Depends(check_caller)])

    @router.get("/status", responses=_problems())
    def list_regions() -> list[SharedMemoryRegion]:
        """Every registered region of shared memory."""
        return [SharedMemoryRegion.of(*one) for one in sorted(regions.registered().items())]

    @router.get("/region/{region}/status", responses=_problems(404))
    def show_region(region: str) -> list[SharedMemoryRegion]:
        """One registered region, in a list."""
        found = regions.registered().get(region)
        if found is None:
            raise NotFound(f"no shared memory region named {clip(region)}")
        return [SharedMemoryRegion.of(region, found)]

    @router.post(
        "/region/{region}/register",
        responses=_problems(400, 404, 409, 413, 422),
        openapi_extra=body("Registration"),
    )
    async def register_region(region: str, request: Request) -> RegionsChanged:
        """Name a range of bytes of a shared memory object, for tensors of infer requests."""
        try:
            asked = msgspec.json.decode(await read_body(request.stream(), MAX_BYTES), type=Registration)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"body: {error}") from error
        await run_in_threadpool(regions.register, region, asked.key, asked.offset, asked.byte_size)
        return RegionsChanged()

    @router.post("/unregister", responses=_problems())
    def unregister_all_regions() -> RegionsChanged:
        """Forget every region, whoever registered it."""
        regions.unregister()
        return RegionsChanged()

    @router.post("/region/{region}/unregister", responses=_problems())
    def unregister_region(region: str) -> RegionsChanged:
        """Forget a region; nothing happens where there is none of this name."""
        regions.unregister(region)
        return RegionsChanged()

    return router


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return problems(403, *statuses, model="InferProblem")

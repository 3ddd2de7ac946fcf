from __future__ import annotations

from collections.abc import Sequence

import pytest

from gr_core.testing import PluginSuite, ServerSuite
from gr_core.types import ItemId, RecommendRequest
from gr_serve_grpc.client import AsyncClient, Retries


class TestPlugin(PluginSuite):
    plugin = "grpc"


class GrpcClient:
    async def recommend(self, address: str, request: RecommendRequest) -> Sequence[ItemId]:
        async with AsyncClient(address, retries=Retries(attempts=1)) as client:
            return [item.item_id for item in (await client.recommend(request)).items]


class TestServer(ServerSuite):
    protocol = "grpc"

    @pytest.fixture
    def client(self) -> GrpcClient:
        return GrpcClient()

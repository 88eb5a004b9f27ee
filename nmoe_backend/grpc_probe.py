"""Asking our Triton over gRPC whether it answers."""

from __future__ import annotations

import grpc

_LIVE = "/inference.GRPCInferenceService/ServerLive"  # its request without a field is no bytes
_TIMEOUT_S = 2.0
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: what a new client meets
    ("grpc.enable_http_proxy", 0),  # whatever the environment says
)


def answers(address: str) -> bool:
    """Whether a new connection to HOST:PORT and one call on it succeed in time."""
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            channel.unary_unary(_LIVE)(b"", timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return True

"""The published messages of sglang.grpc.scheduler.SglangScheduler (package smg-grpc-proto), fit for Ray Serve.

The generated classes name flat modules (`common_pb2`) as theirs, which nobody can import; Serve pickles messages on
their way to a replica, and every call fails. Here the modules get those names as well. Whoever handles the messages
imports them from here, and Serve's `grpc_servicer_functions` names the function below.
"""

from __future__ import annotations

import sys

from smg_grpc_proto.generated import common_pb2, sglang_scheduler_pb2, sglang_scheduler_pb2_grpc

sys.modules.setdefault("common_pb2", common_pb2)
sys.modules.setdefault("sglang_scheduler_pb2", sglang_scheduler_pb2)

common = common_pb2
scheduler = sglang_scheduler_pb2
add_SglangSchedulerServicer_to_server = sglang_scheduler_pb2_grpc.add_SglangSchedulerServicer_to_server

SERVICE = scheduler.DESCRIPTOR.services_by_name["SglangScheduler"]
#: name of every RPC of the service -> whether its answer is a stream
RPCS: dict[str, bool] = {method.name: method.server_streaming for method in SERVICE.methods}

"""What a probe and an explorer of gRPC do: the standard health service (Check, Watch) and reflection, by the clients of
grpcio-health-checking and grpcio-reflection. Run by scripts/try_clients.py; knows nothing of Loong but its names.
"""

import sys
import traceback

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICES = {"loong.v1.Loong", "jetstream_proto.Orchestrator", "grpc.health.v1.Health"}
TIMEOUT_S = 60


class Cases:
    """Each method is a case; it raises where the server is not as the clients expect."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)

    def check(self, service: str) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        return self.health.Check(request, timeout=TIMEOUT_S).status

    def case_health_check(self):
        for service in ("", "loong.v1.Loong", "jetstream_proto.Orchestrator"):
            assert self.check(service) == health_pb2.HealthCheckResponse.SERVING, service

    def case_health_of_an_unknown_service(self):
        request = health_pb2.HealthCheckRequest(service="no.such.Service")
        call = self.health.Check.future(request, timeout=TIMEOUT_S)
        assert call.exception() is not None, "it was found"
        assert call.code() is grpc.StatusCode.NOT_FOUND, call

    def case_health_watch(self):
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service="loong.v1.Loong"), timeout=TIMEOUT_S)
        assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()

    def case_reflection_lists_the_services(self):
        listed = set(self.database.get_services())
        assert SERVICES <= listed, listed

    def case_a_call_by_reflection_alone(self):
        """As grpcurl does: the message types come from the server."""
        pool = DescriptorPool(self.database)
        method = pool.FindServiceByName("loong.v1.Loong").FindMethodByName("Generate")
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = self.channel.unary_stream(
            "/loong.v1.Loong/Generate",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        answers = list(call(request(text="The sky is", max_tokens=3), timeout=TIMEOUT_S))
        assert answers[-1].finished.usage.completion_tokens in (1, 2, 3), answers


def main(target: str) -> int:
    cases = Cases(target)
    failed = 0
    for name in [name for name in dir(cases) if name.startswith("case_")]:
        try:
            getattr(cases, name)()
            print(f"ok      {name.removeprefix('case_')}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name.removeprefix('case_')}\n{traceback.format_exc()}", flush=True)
    print(f"grpcio {grpc.__version__}: {failed} failed")
    return failed and 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""gRPC without generated code and without signal handling: `grpc_server.py PORT WORK`. `/test/Unary` answers after WORK
milliseconds, `/test/Stream` sends five messages meanwhile. Each message repeats the request."""
import sys
import time
from concurrent import futures

import grpc

WORK = int(sys.argv[2]) / 1000


def unary(request, context):
    time.sleep(WORK)
    return b'done ' + request


def stream(request, context):
    for number in range(5):
        yield b'%d ' % number + request
        time.sleep(WORK / 5)


class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return {
            '/test/Unary': grpc.unary_unary_rpc_method_handler(unary),
            '/test/Stream': grpc.unary_stream_rpc_method_handler(stream),
        }.get(details.method)


server = grpc.server(futures.ThreadPoolExecutor(max_workers=64), handlers=[Handler()])
server.add_insecure_port(f'127.0.0.1:{sys.argv[1]}')
server.start()
server.wait_for_termination()

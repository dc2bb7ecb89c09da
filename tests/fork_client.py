"""Stands in for `python -m MODULE ...`: the fork server runs it with this process's streams, folder and environment.

`fork_server.interpreter` puts a copy beside the server's socket. It imports nothing slow.
"""

import json
import os
import signal
import socket
import sys

if sys.argv[1:2] != ["-m"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
connection = socket.socket(socket.AF_UNIX)
connection.connect(f"{os.path.dirname(os.path.abspath(__file__))}/socket")
request = json.dumps({"words": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(request)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
code = int(connection.recv(16) or b"1")
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)

"""Ask a running ``xverse serve`` whether it is ready: ``python -m xverse.commands.health [PID]``.

For a container's health check: the address comes from the command line of process PID (1, a container's
main process), so it follows --port, --host, --uds and --tls-cert. The exit code is 0 if it is ready.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

from xverse.cli import verb_parser
from xverse.commands.serve import address_of


def ready(pid: int, timeout: float = 5.0) -> bool:
    """Whether the server in process ``pid`` answers that it is ready."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    flags = verb_parser("serve").parse_args([word for word in words[words.index("serve") + 1 :] if word])
    host, port = address_of(flags)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection: Any
    if flags.tls_cert is not None:
        unverified = ssl._create_unverified_context()  # the server is this machine's own
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=unverified)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    if flags.uds is not None:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout)
        connection.sock.connect(flags.uds)
    connection.request("GET", "/health", headers={"Host": "localhost"})
    answer = connection.getresponse()
    return answer.status == 200 and json.loads(answer.read()) == {"status": "ready"}


def main() -> int:
    try:
        return 0 if ready(int(sys.argv[1]) if len(sys.argv) > 1 else 1) else 1
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Whether a Ray cluster answers at an address, before Ray itself tries for minutes and then ends the process.

Three looks, each of which refuses only what cannot be a head, so that a head that is slow is never turned away:

1. A TCP connection: refused, or no such host.
2. A greeting of HTTP/2, which is what gRPC and so Ray speaks. Any gRPC server sends its settings at once, from threads
   of the network library that do not wait for the program behind them. So a web server, a database or a shell gives
   itself away by another answer, or by none in ``ANSWER_S``, which a head would pass however busy it is.
3. The question that a driver asks first, in a process of its own because it cannot be taken back. Another gRPC service
   (Ray's own client port, for one) does not know it and says so at once. A head may take as long as it likes: after
   ``QUESTION_S`` this module stops listening and leaves it to Ray, which has longer time limits of its own.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time

from eggroll.errors import ConfigError

CONNECT_S = 5.0
ANSWER_S = 8.0
QUESTION_S = 15.0
HOW = (
    "Start one with `ray start --head` on one machine and `ray start --address HOST:6379` on the others; `ray status` "
    "on any of them says whether it runs. Without an address, workers are started on this machine"
)
SETTINGS = 4
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])
"""HTTP/2's first words, and an empty frame of settings."""
NOT_THERE = 3
ASK = f"""
import sys
try:
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient
    address = canonicalize_bootstrap_address(sys.argv[1])
except Exception:
    sys.exit(0)
try:
    GcsClient(address=address)
except Exception as error:
    unimplemented = 12
    sys.exit({NOT_THERE} if getattr(error, "rpc_code", None) == unimplemented else 0)
"""
"""No public name of Ray's asks so early; where these have moved, Ray's own time limits have to do."""


def check_address(address: str) -> None:
    """Look whether a Ray cluster answers at ``host:port``; ``auto`` is for Ray to find.

    Raises:
        ConfigError: nobody answers, or somebody who is no Ray head; after 15 seconds at most.
    """
    if address == "auto":
        return
    found = re.fullmatch(r"\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if found is None:
        kind = "a Ray Client address, which is not supported: run the driver on a machine of the cluster, or send " if (
            address.startswith("ray://")
        ) else "no address: "  # fmt: skip
        more = "it there with `ray job submit`. " if address.startswith("ray://") else ""
        raise ConfigError(f"address={address!r} is {kind}{more}it must be 'auto' or 'HOST:PORT'. {HOW}")
    try:
        with socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S) as connection:
            answer = None if _encrypted() else _greet(connection)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at address={address!r} ({error}). {HOW}") from error
    if answer is not None and not (len(answer) == 9 and answer[3] == SETTINGS):
        said = f"it answers {answer!r}" if answer else f"it says nothing in {ANSWER_S:g} s, or hangs up"
        raise _other(address, f"{said} to a greeting of gRPC")
    if _knows_nothing(address):
        raise _other(address, "it speaks gRPC and does not know what Ray's head is asked")


def _other(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"something listens at address={address!r}, but it is no Ray head ({why}). The port is the one of "
        f"`ray start --head --port` (6379 if left out); 8265 is the dashboard's and 10001 the client's. {HOW}"
    )


def _encrypted() -> bool:
    """With TLS a greeting in the clear is answered by nobody."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _greet(connection: socket.socket) -> bytes:
    """The first bytes that a server says to HTTP/2, the length of a frame's header at most."""
    end, answer = time.monotonic() + ANSWER_S, b""
    connection.sendall(GREETING)
    while len(answer) < 9 and (left := end - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            part = connection.recv(9 - len(answer))
        except OSError:  # too late, or it hung up
            break
        if not part:
            break
        answer += part
    return answer


def _knows_nothing(address: str) -> bool:
    """Whether a gRPC server says that it has no such service as Ray's head."""
    command = [sys.executable, "-c", ASK, address]
    try:
        done = subprocess.run(command, capture_output=True, timeout=QUESTION_S, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == NOT_THERE

"""Readiness of a vLLM server: the first time one real answer, afterwards its health. Runs in the server's container.

Arguments: port, name of the model. Exit code 0: ready. A server under load answers late, and must not lose its
clients for that: so only the first look sends a request.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path

PORT, MODEL = sys.argv[1], sys.argv[2]
# of this container's life: the first process's start, since a folder may outlive a restart
STARTED = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]
ANSWERED = Path(os.environ.get("READY_FOLDER", "/tmp")) / f"answered-{PORT}-{STARTED}"
BASE = f"http://127.0.0.1:{PORT}"


def ask(path: str, body: object = None) -> bytes:
    """The server's answer; an exception when it refuses or is not there."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(BASE + path, data, headers), timeout=20) as answer:
        content: bytes = answer.read()
    return content


try:
    ask("/health")
    if not ANSWERED.exists():
        answer = json.loads(ask("/v1/completions", {"model": MODEL, "prompt": "1", "max_tokens": 1}))
        if answer["usage"]["completion_tokens"] < 1:
            sys.exit("the server answers without a token")
        ANSWERED.touch()
except (OSError, ValueError, LookupError) as error:
    sys.exit(f"not ready: {error}")

"""Pulumi's Python language host, for where the real `pulumi-language-python` is not on the PATH.

The CLI starts it with the engine's address as its last argument and reads the port from its first line of output. Run
starts the executor of Pulumi's Go SDK (`pulumi-language-python-exec`) with this very Python: there is no virtual
environment to choose.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2
from pulumi.runtime.proto import language_pb2, language_pb2_grpc, plugin_pb2

ALREADY_REPORTED = 32
"""Exit code of the executor when it has told the engine itself what went wrong."""
MESSAGE_LIMIT_BYTES = 400 * 1024 * 1024
PACKAGES = {"pulumi-azure-native": "azure-native", "pulumi-kubernetes": "kubernetes"}


class LanguageHost(language_pb2_grpc.LanguageRuntimeServicer):
    """Pulumi's LanguageRuntime service: what the engine asks of a host to run a Python program or policy pack."""

    def __init__(self, executor: Path) -> None:
        self.executor = executor
        self.engine_address = ""
        self.children: set[subprocess.Popen[bytes]] = set()

    def Handshake(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.engine_address = request.engine_address
        return language_pb2.LanguageHandshakeResponse()

    def GetPluginInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin_pb2.PluginInfo(version=metadata.version("pulumi"))

    def About(self, request: Any, context: Any) -> Any:  # noqa: N802
        return language_pb2.AboutResponse(executable=sys.executable, version=sys.version.split()[0])

    def GetRequiredPlugins(self, request: Any, context: Any) -> Any:  # noqa: N802
        return language_pb2.GetRequiredPluginsResponse()

    def GetRequiredPackages(self, request: Any, context: Any) -> Any:  # noqa: N802
        return language_pb2.GetRequiredPackagesResponse()  # the providers are attached to, not installed

    def GetProgramDependencies(self, request: Any, context: Any) -> Any:  # noqa: N802
        found = {one.metadata["Name"]: one.version for one in metadata.distributions()}
        return language_pb2.GetProgramDependenciesResponse(
            dependencies=[
                language_pb2.DependencyInfo(name=name, version=version)
                for name, version in sorted(found.items())
                if request.transitiveDependencies or name in PACKAGES
            ]
        )

    def RuntimeOptionsPrompts(self, request: Any, context: Any) -> Any:  # noqa: N802
        return language_pb2.RuntimeOptionsResponse()

    def InstallDependencies(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        yield language_pb2.InstallDependenciesResponse(stdout=b"The dependencies are those of this Python.\n")

    def Run(self, request: Any, context: Any) -> Any:  # noqa: N802
        command = [
            *(sys.executable, "-u", str(self.executor)),
            *("--monitor", request.monitor_address, "--engine", self.engine_address),
            *("--project", request.project, "--stack", request.stack, "--organization", request.organization),
            *("--pwd", request.pwd, "--dry_run", "true" if request.dryRun else "false"),
            *("--parallel", str(request.parallel), "--root_directory", request.info.root_directory),
            request.info.entry_point or request.program,
            *request.args,
        ]
        environment = {
            **os.environ,
            "PULUMI_CONFIG": json.dumps(dict(request.config)),
            "PULUMI_CONFIG_SECRET_KEYS": json.dumps(list(request.configSecretKeys)),
        }
        child = self._start(command, cwd=request.info.program_directory or request.pwd, env=environment)
        code = child.wait()
        self.children.discard(child)
        if code == 0:
            return language_pb2.RunResponse()
        if code == ALREADY_REPORTED:
            return language_pb2.RunResponse(bail=True)
        return language_pb2.RunResponse(error=f"Program exited with non-zero exit code: {code}")

    def RunPlugin(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        directory = request.info.program_directory
        command = [sys.executable, "-u", "-m", "pulumi.policy", *request.args, directory]
        if request.kind != "analyzer":
            command = [sys.executable, "-u", directory, *request.args]
        environment = dict(entry.split("=", 1) for entry in request.env) or dict(os.environ)
        child = self._start(
            command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        context.add_callback(lambda: _stop(child))
        lines: queue.Queue[Any] = queue.Queue()
        pumps = [
            threading.Thread(target=_pump, args=(stream, field, lines), daemon=True)
            for stream, field in ((child.stdout, "stdout"), (child.stderr, "stderr"))
        ]
        for pump in pumps:
            pump.start()
        for _ in pumps:
            while (answer := lines.get()) is not None:
                yield answer
        code = child.wait()
        self.children.discard(child)
        yield language_pb2.RunPluginResponse(exitcode=code)

    def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.stop()
        return empty_pb2.Empty()

    def stop(self) -> None:
        """End what this host has started."""
        for child in list(self.children):
            _stop(child)

    def _start(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
        self.children.add(child)
        return child


def _pump(stream: Any, field: str, lines: "queue.Queue[Any]") -> None:
    while chunk := stream.read(65536):
        lines.put(language_pb2.RunPluginResponse(**{field: chunk}))
    lines.put(None)


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()


def main() -> None:
    """Serve until the CLI ends us by SIGINT or SIGTERM, or is gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executor", type=Path, required=True, help="path of pulumi-language-python-exec")
    parser.add_argument("engine", nargs="?", default="", help="address of the engine (the CLI gives it last)")
    arguments, _ = parser.parse_known_args()
    limits = [
        ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ]
    server = grpc.server(ThreadPoolExecutor(max_workers=8), options=limits)
    host = LanguageHost(arguments.executor)
    host.engine_address = arguments.engine
    language_pb2_grpc.add_LanguageRuntimeServicer_to_server(host, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    print(port, flush=True)
    cli = os.getppid()
    while not ended.wait(1) and os.getppid() == cli:
        pass  # a CLI that was killed ends nobody
    host.stop()
    server.stop(grace=1).wait()


if __name__ == "__main__":
    main()

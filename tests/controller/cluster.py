"""A controller and its replicas as real processes, and streams that outlive them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from held import planted_in
from waiting import PATIENCE_S, wait_until

READY = re.compile(r"on (http://\S+)")


@dataclass(frozen=True)
class Cluster:
    """``minserve serve --replicas N`` as people start it."""

    process: subprocess.Popen
    url: str
    log: Path

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as answer:
            body = answer.read()
        return json.loads(body) if path != "/metrics" else body.decode()

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.loads(answer.read())

    def replicas(self) -> list[dict[str, Any]]:
        return self.get("/replicas")["replicas"]

    def is_healthy(self) -> bool:
        """Whether it takes requests."""
        try:
            return bool(self.get("/health"))
        except urllib.error.HTTPError:
            return False

    def busy(self) -> dict[str, Any]:
        """The replica that runs something."""
        return next(replica for replica in self.replicas() if replica["requests"])

    def lose(self, number: int) -> None:
        """Kill a replica, and return once the controller knows: until then it seems to be up."""
        before = self.replicas()[number]
        os.kill(before["pid"], signal.SIGKILL)
        self.wait_until_lost(before)

    def wait_until_lost(self, before: Mapping[str, Any]) -> None:
        """Wait until the controller has given up a replica, which was so before."""
        wait_until(lambda: self.replicas()[before["replica"]]["lost"] > before["lost"])

    def error_of(self, body: Mapping[str, Any]) -> str:
        """The message of a request that is answered with an error."""
        try:
            answer = self.post("/v1/completions", body)
        except urllib.error.HTTPError as error:
            return json.loads(error.read())["error"]["message"]
        raise AssertionError(answer)

    def wait_until_up(self) -> list[dict[str, Any]]:
        """All replicas, once all are up."""
        return wait_until(
            lambda: (
                (found := self.replicas()) and all(one["state"] == "up" for one in found) and found
            )
        )

    def stream(
        self, body: Mapping[str, Any], after: int = 0, then: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """Token ids of each choice, from the log probabilities of its chunks.

        Args:
            after: chunks after which ``then`` is called.
        """
        request = urllib.request.Request(
            self.url + "/v1/completions",
            data=json.dumps({**body, "stream": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        texts = [""] * body.get("n", 1)
        tokens: list[list[str]] = [[] for _ in texts]
        num_chunks = 0
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["text"]
                    tokens[choice["index"]] += choice["logprobs"]["tokens"]
                num_chunks += 1
                if num_chunks == after:
                    then()
        return list(zip(texts, tokens, strict=True))


def launch(
    log: Path,
    model: Path,
    *flags: str,
    torchrun: Sequence[str] = (),
    module: str = "minserve",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """``minserve serve`` with a small model.

    Args:
        log: takes what it writes to stderr.
        torchrun: its flags, where that is to start it.
        module: what is run in place of ``minserve``.
        environment: variables beside this process's own.
    """
    command = ["-m", "torch.distributed.run", *torchrun, "-m"] if torchrun else ["-m"]
    with log.open("w") as stderr:
        return subprocess.Popen(
            [
                sys.executable, *command, module, "serve", "--model", str(model),
                "--port", "0", "--dtype", "float32", "--profile-seconds", "0.5",
                "--num-blocks", "160", "--block-size", "16", *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )  # fmt: skip


def announced(process: subprocess.Popen, log: Path) -> Cluster:
    """Wait until it serves."""
    told = READY.search(process.stdout.readline())
    assert told, log.read_text()
    return Cluster(process, told[1], log)


def start_cluster(
    model: Path, folder: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """Start it, and at the end stop it with SIGTERM, which has to work.

    Its replicas are held by a `Hold` of the same folder.
    """
    log = folder / "cluster.log"
    process = launch(
        log,
        model,
        *flags,
        module="planted_serve",
        environment={**planted_in(folder), **(environment or {})},
    )
    try:
        yield announced(process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()

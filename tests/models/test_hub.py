"""Tests of `--weights=hf://OWNER/NAME`, against a server that stands in for the hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from research.loop.builder import build_network
from research.models import hub
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from tests.helpers import ROOT

COMMIT = "0123456789" * 4
CONTENT = bytes(range(256)) * 40
# Prints the path and the commit of downloaded weights, or the message of the error.
DOWNLOAD = """
import json, sys
from research.models.hub import download_weights
from research.system.errors import UserError
try:
    print(json.dumps([*download_weights(sys.argv[1])]))
except UserError as error:
    print(json.dumps([str(error)]))
assert "tensorflow" not in sys.modules
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one repository, owner/name, whose branch main has one commit."""

    content = CONTENT

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        paths = [f"/owner/name/resolve/{one}/model.safetensors" for one in ("main", COMMIT)]
        found = self.path in paths
        self.send_response(200 if found else 404)
        if found:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        body = self.content if found else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_content:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def download(weights: str, cache: Path, endpoint: str) -> list[str]:
    pytest.importorskip("huggingface_hub")
    environment = {
        **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, weights],
        cwd=cache,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


NOWHERE = "http://127.0.0.1:9"


def test_a_file_is_downloaded_once_and_found_without_a_network(endpoint, tmp_path):
    path, commit = download("hf://owner/name", tmp_path, endpoint)
    assert Path(path).read_bytes() == CONTENT
    assert commit == COMMIT
    assert download("hf://owner/name", tmp_path, NOWHERE) == [path, commit]
    assert download(f"hf://owner/name@{COMMIT}", tmp_path, NOWHERE) == [path, commit]
    file = Path(path).resolve()
    file.write_bytes(CONTENT[:-1] + b"!")
    (message,) = download("hf://owner/name", tmp_path, NOWHERE)
    assert message == (
        f"weights is 'hf://owner/name'; the downloaded file {file} does not have the hash of the "
        "hub: delete it, and run the command again"
    )


def test_a_changed_download_is_refused(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "content", CONTENT[:-1] + b"!")
    (message,) = download("hf://owner/name", tmp_path, endpoint)
    assert "does not have the hash of the hub" in message


def test_a_cache_without_links_is_refused_with_the_way_out(monkeypatch, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(CONTENT)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(file))
    with pytest.raises(
        UserError, match=r"no symbolic links there, .* or give the path of the file"
    ):
        hub.download_weights("hf://owner/name")


@pytest.mark.parametrize("weights", ["hf://owner/other", "hf://owner/name@v2"])
def test_an_unknown_repository_or_revision_is_one_line(weights, endpoint, tmp_path):
    (message,) = download(weights, tmp_path, endpoint)
    assert message.startswith(f"weights is {weights!r}; could not download model.safetensors (")
    assert message.endswith("); check the name, or download the file and give its path")
    assert "\n" not in message


@pytest.mark.parametrize(
    "weights", ["hf://name", "hf://a/b/c", "hf://a/../b", "hf://a/b@", "hf://a/b@../c", "hf:///b"]
)
def test_other_forms_are_refused_before_anything_is_read(weights):
    with pytest.raises(UserError) as caught:
        TrainConfig(weights=weights)
    assert str(caught.value) == (
        f"weights is {weights!r}; expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
    )


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"huggingface_hub is not installed; .*'\.\[hub\]'"):
        hub.download_weights("hf://owner/name")


def test_a_run_loads_the_file_and_shows_its_commit(tmp_path):
    config = TrainConfig(
        backbone="SmallResNet", image_size=32, weights="none", unfreeze_from="none"
    )
    path = str(tmp_path / "model.weights.h5")
    build_network(config, ("a", "b")).network.model.backbone.save_weights(path)
    config = TrainConfig(
        backbone="SmallResNet", image_size=32, weights="hf://a/b@v1", unfreeze_from="none"
    )
    with mock.patch.object(hub, "download_weights", lambda _: hub.HubFile(path, COMMIT)):
        origin = build_network(config, ("a", "b")).origin
    assert origin.startswith("loaded ")
    assert origin.endswith(" variables from model.weights.h5, hf://a/b@v1, commit 01234567")

"""The viewer's server: host names without case, HEAD, and framing."""

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest
from viewer import saved, serving

from tiledcore.cli.view import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(saved(tmp_path / "a.tif")) as server:
        yield server


def ask(server: Server, method: str, path: str, host: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


@pytest.mark.parametrize(
    ("host", "status"),
    [("LOCALHOST", 200), ("LocalHost:80", 200), ("127.0.0.1", 200), ("evil.example", 403), ("localhost.evil", 403)],
)
def test_host_names_have_no_case(host: str, status: int, server: Server) -> None:
    assert ask(server, "GET", "/", host)[0].status == status


@pytest.mark.parametrize("path", ["/", "/picture.json", "/tiles/0/0/0.png", "/nothing"])
def test_head_is_get_without_its_content(path: str, server: Server) -> None:
    got, content = ask(server, "GET", path, "localhost")
    head, nothing = ask(server, "HEAD", path, "localhost")
    assert (head.status, nothing) == (got.status, b"")
    for name in ("Content-Type", "Content-Length", "Content-Security-Policy"):
        assert head.headers[name] == got.headers[name]
    assert int(head.headers["Content-Length"]) == len(content) > 0


def test_no_page_may_frame_it(server: Server) -> None:
    assert "frame-ancestors 'none'" in ask(server, "GET", "/", "localhost")[0].headers["Content-Security-Policy"]

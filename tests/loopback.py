"""Small HTTP servers on this machine, in the place of a hub."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_the_right_one"
ALONE = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
"""The environment without anything that a hub's client reads."""


class Answers(BaseHTTPRequestHandler):
    """Answers HEAD and GET by `answer`, which a subclass has."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        pass

    def asked_path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")


def serve(kind: type[Answers], **shared: object) -> ThreadingHTTPServer:
    """Answer on a free port until `shutdown` and `server_close`; `shared` becomes attributes of every handler."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """A client that has gone is no news here."""

    server = Server(("127.0.0.1", 0), type(kind.__name__, (kind,), shared))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server

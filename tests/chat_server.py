"""A chat server on this machine that answers as a test tells it to."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]


def said(text: Any, **usage: int) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


class Server:
    """Answers with what `script` says of each request's number (from 0) and body; `seen` are path, headers and body."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Reply]):
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        lock, seen = threading.Lock(), self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(seen)
                    seen.append((self.path, dict(self.headers), body))
                code, value, headers = script(number, body)
                raw = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(code)
                for name, each in headers.items():
                    self.send_header(name, each)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

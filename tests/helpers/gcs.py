"""A bucket of Google Cloud Storage in memory.

It has as much of the JSON API as gcsfs, TensorStore and Orbax use:
https://cloud.google.com/storage/docs/json_api/v1
"""

import contextlib
import http.server
import itertools
import json
import threading
import urllib.parse

BUCKET, STRANGER = "bucket", "strangers"  # one that is there, and one that may not be read
PAGE = 5  # names in a page of a listing, so that there are several


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        bucket, _, rest = url.path.partition("/b/")[2].partition("/")
        self.query, self.body = (
            dict(urllib.parse.parse_qsl(url.query)),
            self.rfile.read(int(self.headers.get("Content-Length") or 0)),
        )
        self.server.requests.append(f"{self.command} {self.path}")
        with self.server.lock:
            self.answer(
                *self.respond(
                    bucket,
                    urllib.parse.unquote(rest.removeprefix("o").removeprefix("/")),
                    rest,
                    url.path,
                )
            )

    do_POST = do_PUT = do_DELETE = do_GET

    def respond(self, bucket, name, rest, path):
        """Status, content and headers."""
        if bucket == STRANGER:
            return 401, {
                "error": {
                    "code": 401,
                    "message": "Anonymous caller does not have storage.objects.list access",
                }
            }
        if bucket != BUCKET:
            return 404, {"error": {"code": 404, "message": "The specified bucket does not exist."}}
        if path.startswith("/upload"):
            return self.upload()
        if not rest:
            return 200, {"kind": "storage#bucket", "name": bucket}
        if not name:
            return self.list()
        if self.command == "POST":  # .../moveTo/o/...
            source, target = (
                urllib.parse.unquote(part) for part in rest.removeprefix("o/").split("/moveTo/o/")
            )
            return (
                self.put(target, self.server.objects.pop(source)[0])
                if source in self.server.objects
                else (404, {})
            )
        if name not in self.server.objects:
            return 404, {"error": {"code": 404, "message": f"No such object: {name}"}}
        if self.command == "DELETE":
            del self.server.objects[name]
            return 204, b""
        return self.media(name) if self.query.get("alt") == "media" else (200, self.resource(name))

    def media(self, name):
        content, generation = self.server.objects[name]
        headers = {
            "x-goog-generation": generation,
            "x-goog-metageneration": 1,
            "ETag": f'"{generation}"',
        }
        if self.query.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", headers
        if "Range" not in self.headers:
            return 200, content, headers
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start, end = (
            (int(first), min(int(last or len(content)) + 1, len(content)))
            if first
            else (len(content) - int(last), len(content))
        )
        return (
            206,
            content[start:end],
            headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"},
        )

    def list(self):
        prefix, delimiter, found = self.query.get("prefix", ""), self.query.get("delimiter", ""), {}
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset", chr(0x10FFFF))
        for name in sorted(self.server.objects):
            if name.startswith(prefix) and first <= name < end:
                head, cut, _ = (
                    name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                )
                found[prefix + head + cut if cut else name] = bool(cut)
        start = int(self.query.get("pageToken", 0))
        stop = start + min(int(self.query.get("maxResults", PAGE)), PAGE)
        shown, more = (
            list(found.items())[start:stop],
            {"nextPageToken": str(stop)} if stop < len(found) else {},
        )
        items = [self.resource(name) for name, cut in shown if not cut]
        return 200, {
            "kind": "storage#objects",
            "items": items,
            "prefixes": [name for name, cut in shown if cut],
        } | more

    def upload(self):
        kind, name, content = self.query["uploadType"], self.query.get("name"), self.body
        if "upload_id" in self.query:
            chunks = self.server.uploads[self.query["upload_id"]]
            chunks.append(content)
            size = sum(map(len, chunks))
            if size < int(self.headers["Content-Range"].rpartition("/")[2]):
                return 308, b"", {"Range": f"bytes=0-{size - 1}"}
            content = b"".join(chunks)
        elif kind == "resumable":
            upload = str(next(self.server.generations))
            self.server.uploads[upload] = []
            return (
                200,
                {},
                {"Location": f"http://{self.headers['Host']}{self.path}&upload_id={upload}"},
            )
        elif kind == "multipart":  # of gcsfs, whose lines end in \n
            head, _, content = content.partition(b"\n--==0==\n")
            name, content = (
                json.loads(head.partition(b"\n\n")[2])["name"],
                content.partition(b"\n\n")[2].removesuffix(b"\n--==0==--"),
            )
        expected = self.query.get("ifGenerationMatch")
        if expected not in (None, str(self.server.objects.get(name, (None, 0))[1])):
            return 412, {
                "error": {
                    "code": 412,
                    "message": "At least one of the pre-conditions you specified did not hold.",
                }
            }
        return self.put(name, content)

    def put(self, name, content):
        self.server.objects[name] = content, next(self.server.generations)
        return 200, self.resource(name)

    def resource(self, name):
        content, generation = self.server.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        return {
            "name": name,
            "bucket": BUCKET,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
        } | times

    def answer(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": len(content)} | dict(headers)).items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def served():
    """Yields a server.

    It has `objects` {name: (content, generation)}, `requests`, and the `environment` that leads
    clients to it.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.objects, server.uploads, server.requests = {}, {}, []
    server.handle_error = lambda *_: None  # clients hang up on answers that they need no more
    server.generations, server.lock = itertools.count(1), threading.Lock()
    url = f"http://127.0.0.1:{server.server_port}"
    server.environment = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks for the kind of a bucket by gRPC
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()

"""Who may come in: the API key around every request, other origins' pages, and what the own page may do in a browser."""

import base64
import hashlib
import re
import secrets
import urllib.parse

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from telechat.errors import InputError
from telechat.serving.api_error import APIError

OPEN = ("/health",)  # answers without the key
ANY_ORIGIN = "*"
PREFLIGHT_SECONDS = 600  # that a browser may remember what it was told
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


def read_origin(text):
    """An origin as browsers send it, scheme://host or scheme://host:port in lower case; "*" is any, "null" that of files.

    Raises:
        InputError: it is none.
    """
    origin = text.lower().rstrip("/")
    if origin in (ANY_ORIGIN, "null") or _ORIGIN.fullmatch(origin):
        return origin
    raise InputError(f"--allow_origin {text} is not an origin; give scheme, host and port alone, as in "
                     "http://localhost:3000, or * for any")


class AccessMiddleware:
    """Asks for the key, answers browsers that ask for another origin's page, and counts the requests (ASGI).

    A path's doubled and last slashes do not count: ``/v1//models/`` is ``/v1/models``.

    Args:
        app: ASGI application.
        api_key (str): None: nobody is asked.
        metrics (Metrics): counts by path and status.
        paths (set of str): that are counted by name; the others are "other".
        origins (sequence of str): of `read_origin`, whose pages may use the server; the server's own always may.
    """

    def __init__(self, app, api_key, metrics, paths, origins=()):
        self.app = app
        self.api_key = api_key
        self.metrics = metrics
        self.paths = paths
        self.origins = frozenset(origins)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        scope = {**scope, "path": re.sub("/+", "/", scope["path"]).rstrip("/") or "/"}
        path = scope["path"] if scope["path"] in self.paths else "other"
        headers = Headers(scope=scope)
        allowed = self._allowed_origin(headers)

        async def outward(message):
            if message["type"] == "http.response.start":
                self.metrics.request(path, message["status"])
                answer = MutableHeaders(scope=message)
                if self.origins:
                    answer.add_vary_header("Origin")
                if allowed is not None:
                    answer["access-control-allow-origin"] = allowed
                    answer["access-control-expose-headers"] = "Retry-After"
            await send(message)

        if scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
            answer = self._preflight(headers, allowed)
        elif self.api_key is None or scope["path"] in OPEN or self._knows_key(headers):
            answer = self.app
        else:
            error = APIError(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")
            # A browser that is asked for Basic shows a login and then sends it for the page's requests too.
            asking = {"www-authenticate": 'Basic realm="telechat: any name, API key as password", charset="UTF-8"'}
            answer = JSONResponse(error.body(), 401, asking)
        await answer(scope, receive, outward)

    def _allowed_origin(self, headers):
        """What to allow the sender of these headers, or None."""
        origin = headers.get("origin", "").lower()
        if not origin:
            return None
        if ANY_ORIGIN in self.origins:
            return ANY_ORIGIN
        own = urllib.parse.urlsplit(origin).netloc == headers.get("host", "").lower() != ""
        return headers["origin"] if own or origin in self.origins else None

    def _preflight(self, headers, allowed):
        """The answer to a browser's question whether a page may send a request (https://fetch.spec.whatwg.org)."""
        if allowed is None:
            error = APIError(403, f"pages of {headers['origin'][:100]} may not use this server; its operator can let them "
                                  "in with --allow_origin", code="origin_not_allowed")
            return JSONResponse(error.body(), 403)
        answer = {"access-control-allow-methods": "GET, POST, OPTIONS", "access-control-max-age": str(PREFLIGHT_SECONDS),
                  "access-control-allow-headers": headers.get("access-control-request-headers",
                                                              "Authorization, Content-Type")}
        if headers.get("access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        return Response(status_code=204, headers=answer)

    def _knows_key(self, headers):
        wanted = self.api_key.encode()
        kind, _, given = headers.get("authorization", "").partition(" ")
        given = given.encode("latin-1")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif kind.lower() != "bearer":
            return False
        return secrets.compare_digest(given.strip(), wanted)


def page_headers(page):
    """Headers of the page (str): nothing may run or load but its own script and requests to this server."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
                      for script in scripts)
    return {"content-security-policy": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
                                       "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                                       "frame-ancestors 'none'",
            "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache"}

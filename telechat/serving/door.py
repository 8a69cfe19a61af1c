"""Who may come in: the API key around every request, and what the page may do in a browser."""

import base64
import hashlib
import re
import secrets

from starlette.responses import JSONResponse

from telechat.serving.refusal import Refusal

OPEN = ("/health",)  # answers without the key


class Door:
    """Asks for the key and counts the requests, around everything else (ASGI).

    Args:
        app: ASGI application.
        api_key (str): None: nobody is asked.
        metrics (Metrics): counts by path and status.
        paths (set of str): that are counted by name; the others are "other".
    """

    def __init__(self, app, api_key, metrics, paths):
        self.app = app
        self.api_key = api_key
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counting_send(message):
            if message["type"] == "http.response.start":
                self.metrics.request(path, message["status"])
            await send(message)

        if self.api_key is None or scope["path"] in OPEN or self._knows_key(scope["headers"]):
            await self.app(scope, receive, counting_send)
            return
        refusal = Refusal(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")
        # A browser that is asked for Basic shows a login and then sends it for the page's requests too.
        headers = {"www-authenticate": 'Basic realm="telechat: any name, API key as password", charset="UTF-8"'}
        await JSONResponse(refusal.body(), 401, headers)(scope, receive, counting_send)

    def _knows_key(self, headers):
        wanted = self.api_key.encode()
        for name, value in headers:
            if name == b"authorization":
                kind, _, given = value.partition(b" ")
                if kind.lower() == b"basic":
                    try:
                        given = base64.b64decode(given, validate=True).partition(b":")[2]
                    except ValueError:
                        return False
                elif kind.lower() != b"bearer":
                    return False
                return secrets.compare_digest(given.strip(), wanted)
        return False


def page_headers(page):
    """Headers of the page (str): nothing may run or load but its own script and requests to this server."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
                      for script in scripts)
    return {"content-security-policy": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
                                       "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                                       "frame-ancestors 'none'",
            "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache"}

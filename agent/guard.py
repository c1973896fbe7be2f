"""Who may see the preview, and the headers that keep a browser from doing more than showing it."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from flawline.agent.endpoint import is_loopback
from flawline.config.errors import ConfigError
from flawline.config.settings_preview import PreviewSettings

log = structlog.get_logger()
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_COOKIE_S = 30 * 86400
_OPEN = {"/healthz", "/readyz"}  # asked by supervisors that hold no token; they tell states, not pictures
_LEAST_TOKEN = 16
_HEADERS = {
    # For everything but the page, which brings its own.
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "flawline",
}


def _bytes(text: str) -> bytes:
    """Of a text that came in a header: what was no UTF-8 stands in it as lone surrogates."""
    return text.encode(errors="surrogatepass")


def refuse_open(settings: PreviewSettings) -> None:
    """Raises ConfigError for settings that would leave the page open to other machines."""
    if settings.token_file is None and not is_loopback(settings.host) and not settings.insecure:
        raise ConfigError(
            f"preview.host = {settings.host!r} is reached from other machines: give preview.token_file, "
            "or write `insecure = true` to allow it"
        )


class Guard:
    """Checks every request. Raises ConfigError at the start for settings that would leave the page open."""

    def __init__(self, settings: PreviewSettings) -> None:
        refuse_open(settings)
        self._token: bytes | None = None
        self._local = is_loopback(settings.host)
        self._host = settings.host
        self._origins = settings.allow_origins
        if settings.token_file is not None:
            try:
                token = settings.token_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"preview.token_file: {settings.token_file} cannot be read: {error}") from error
            if len(token) < _LEAST_TOKEN:
                raise ConfigError(
                    f"preview.token_file: {settings.token_file} needs a token of at least {_LEAST_TOKEN} characters"
                )
            self._token = token.encode()
            # Made from the token, but not the token. A browser keeps one cookie of a name for all ports of a host, so
            # stations that have tokens of their own have names of their own.
            self._cookie = hmac.new(self._token, b"flawline page", hashlib.sha256).hexdigest()
            self._cookie_name = f"flawline-{hashlib.sha256(self._cookie.encode()).hexdigest()[:8]}"

    def _knows_token(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_bytes(given.strip()), self._token):
            return True
        return self._shows_cookie(request)

    def _shows_cookie(self, request: web.Request) -> bool:
        if self._token is None:
            return False
        return hmac.compare_digest(_bytes(request.cookies.get(self._cookie_name, "")), self._cookie.encode())

    def _give_cookie(self, response: web.StreamResponse) -> None:
        # Lax: a link from a dashboard shows the page at once. Nothing here can be changed, and no other site's page
        # may read an answer.
        response.set_cookie(self._cookie_name, self._cookie, httponly=True, samesite="Lax", max_age=_COOKIE_S, path="/")

    def _host_is_ours(self, request: web.Request) -> bool:
        """On loopback a foreign name in `Host` means that a web page made its name point at this machine."""
        if not self._local or self._token is not None:
            return True
        try:
            host = urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
        except ValueError:
            return False
        return is_loopback(host) or host == self._host

    def cors(self, request: web.Request) -> dict[str, str]:
        """Headers that let pages of the allowed origins use WHEP; none for the others."""
        origin = request.headers.get("Origin")
        if origin is None or not ("*" in self._origins or origin in self._origins):
            return {}
        return {
            "Access-Control-Allow-Origin": "*" if "*" in self._origins else origin,
            "Access-Control-Expose-Headers": "Location, Accept-Post",
            "Vary": "Origin",
        }

    @web.middleware
    async def middleware(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuse who may not see, and put the headers on every answer."""
        response: web.StreamResponse
        if not self._host_is_ours(request):
            response = web.Response(status=421, text="this address is not served here\n")
        elif request.path == "/" and "token" in request.query and self._token is not None:
            response = self._sign_in(request.query["token"])
        elif request.path in _OPEN or request.method == "OPTIONS" or self._knows_token(request):
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = web.Response(
                    status=error.status,
                    text=f"{error.reason}\n",
                    headers={k: v for k, v in error.headers.items() if k == "Allow"},
                )
            except ConnectionError:  # the reader has gone
                raise
            except Exception as error:  # a request must not fill the log
                log.exception("page_request_failed", path=repr(request.path)[:100], reason=type(error).__name__)
                if request.writer.output_size:
                    raise ConnectionResetError("the answer cannot be finished") from error
                response = web.Response(status=500, text="internal: see the agent's log\n")
        else:
            text = "a token is needed: open /?token=..., or send `Authorization: Bearer ...`\n"
            response = web.Response(status=401, text=text, headers={"WWW-Authenticate": "Bearer"})
        if not response.prepared:
            self.protect(request, response)
        return response

    def protect(self, request: web.Request, response: web.StreamResponse) -> None:
        """The headers; a handler that streams calls this before it prepares its answer."""
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        if (request.path == "/events" or request.path.startswith("/fails/")) and self._shows_cookie(request):
            self._give_cookie(response)  # who watches need not sign in again
        if request.path.count("/") >= 2 and "/whep" in request.path:
            response.headers.update(self.cors(request))

    def _sign_in(self, given: str) -> web.Response:
        assert self._token is not None
        if not hmac.compare_digest(_bytes(given), self._token):
            return web.Response(status=401, text="this is not the token\n")
        answer = web.Response(status=303, headers={"Location": "/"})
        self._give_cookie(answer)
        return answer

"""Addresses without what opens the camera behind them: for status and messages, and for whatever goes into the log.

Cameras take passwords before the `@`, in the query under dozens of names, and in the path
(`/user=admin_password=X_channel=1`); and people write them there with `/`, `@` and blanks as they are. So a doubtful
part is hidden, not shown.
"""

import re

_PART = r'(?:\\.|[^\s"\\])'  # of an address in a text: up to a blank, or a quote that is not escaped
_ADDRESS = re.compile(rf"(?<=://){_PART}+")
_LOGIN_WITH_BLANKS = re.compile(r'(?<=://)[^\s"/@:]*:(?!\d+[/\s"])(?:(?!://)(?:\\.|[^"\n\\]))*@')
_SECRET_IN_PATH = re.compile(r"((?:pas|pw|psw|psk|secret|token|key|auth|credential|login)\w{0,40}=).*", re.IGNORECASE)
_NOT_SURELY_LOGIN = re.compile(r"[?#]|^[^/]*/.*=")
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\])(?::\d*)?")


def hide_passwords(text: str) -> str:
    """The text; in its addresses nothing stands before the `@`, no value in the query, and no path after `password=`
    or the like."""
    return _ADDRESS.sub(_hidden, _LOGIN_WITH_BLANKS.sub("***@", text)) if "://" in text else text


def _hidden(address: re.Match[str]) -> str:
    login, at, rest = address[0].rpartition("@")
    if _NOT_SURELY_LOGIN.search(login):  # the `@` may stand within a password, and what follows it too
        return "***"
    path, mark, query = rest.partition("?")
    if _SECRET_IN_PATH.search(path):
        path, mark, query = _SECRET_IN_PATH.sub(r"\1***", path), "", ""
    values = "&".join(_without_value(item) for item in re.split("[&;]", query)) if query else ""
    return ("***@" if at else "") + path + mark + values


def _without_value(item: str) -> str:
    """`name=***`; what has no name may be the secret."""
    name, equals, _ = item.partition("=")
    return f"{name}=***" if equals else "***"


def bare_address(address: str) -> str:
    """Scheme, host and port of an address on the network, and no more; others, as /dev/video0, as they are.

    Where it is not sure which part the host is, because an `@` stands behind the first `/`, it is not shown either.
    """
    scheme, between, rest = address.partition("://")
    if not between:
        return address
    authority, *path = re.split(r"[/?#]", rest, maxsplit=1)
    host = authority.rpartition("@")[2]
    sure = _HOST.fullmatch(host) and not any("@" in part for part in path)
    return f"{scheme}://{host if sure else '***'}"

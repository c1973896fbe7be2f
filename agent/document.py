"""The operators' page as one document: style sheet, scripts and icon are put into `page/index.html` when it is read.

The page's policy allows no inline code but these very texts, each by its SHA-256 (CSP Level 3 section 2.3.1), and no
file at all: what anybody might get into the page otherwise does not run.
"""

import base64
import hashlib
import re
from importlib.resources import files

_STYLE = re.compile(r'<link rel="stylesheet" href="(\w+\.css)">')
_SCRIPT = re.compile(r'<script src="(\w+\.js)"></script>')
_ICON = re.compile(r'href="(\w+\.svg)"')


def compose() -> tuple[bytes, str]:
    """The document (UTF-8) and the value of its `Content-Security-Policy`."""
    folder = files("flawline.agent") / "page"
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    def inline(tag: str, name: str) -> str:
        text = f"\n{read(name)}"
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
        return f"<{tag}>{text}</{tag}>"

    html = read("index.html")
    html = _STYLE.sub(lambda found: inline("style", found[1]), html)
    html = _SCRIPT.sub(lambda found: inline("script", found[1]), html)
    icon = base64.b64encode(read("icon.svg").encode()).decode()
    html = _ICON.sub(f'href="data:image/svg+xml;base64,{icon}"', html)
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy

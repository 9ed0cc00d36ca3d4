"""Which function answers which request. Paths are matched as they came: a revision's slashes are still ``%2F``."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from hub import reading, talk, uploads, writing

ANSWER = Callable[..., Any]
KIND, REPO, REV = r"(?P<kind>models|datasets)", r"(?P<repo>[^/]+(?:/[^/]+)?)", r"(?P<rev>[^/]+)"
API, PAGE = f"/api/{KIND}/{REPO}", r"/(?P<kind>datasets/)?(?P<repo>[^/]+(?:/[^/]+)?)"
OBJECT = rf"{KIND}/(?P<repo>[^/]+/[^/]+)/(?P<oid>[^/]+)"

ROUTES: list[tuple[str, str, ANSWER]] = [
    ("GET", "/api/whoami-v2", reading.whoami),
    ("GET", r"/api/users/(?P<name>[^/]+)/overview", reading.overview),
    ("POST", "/api/validate-yaml", reading.validate_yaml),
    ("POST", "/api/repos/create", writing.create),
    ("DELETE", "/api/repos/delete", writing.delete),
    ("POST", "/api/repos/move", writing.move),
    ("GET", API, reading.information),
    ("GET", f"{API}/revision/{REV}", reading.information),
    ("GET", rf"{API}/auth-check(?P<write>/write)?", reading.auth_check),
    ("GET", f"{API}/refs", reading.references),
    ("GET", f"{API}/commits/{REV}", reading.commits),
    ("GET", rf"{API}/tree/{REV}(?:/(?P<path>.+))?", reading.tree),
    ("POST", f"{API}/paths-info/{REV}", reading.paths_info),
    ("PUT", f"{API}/settings", writing.settings),
    ("POST", f"{API}/preupload/{REV}", writing.preupload),
    ("POST", f"{API}/commit/{REV}", writing.commit),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", writing.create_branch),
    ("DELETE", rf"{API}/branch/(?P<name>[^/]+)", writing.delete_branch),
    ("POST", f"{API}/tag/{REV}", writing.create_tag),
    ("DELETE", f"{API}/tag/{REV}", writing.delete_tag),
    ("GET", f"{API}/discussions", talk.listed),
    ("POST", f"{API}/discussions", talk.create),
    ("GET", rf"{API}/discussions/(?P<number>\d+)", talk.details),
    ("POST", rf"{API}/discussions/(?P<number>\d+)/(?P<what>comment|title|status|merge)", talk.change),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", uploads.batch),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/verify", uploads.verify),
    ("PUT", rf"/upload/(?P<what>put|part)/{OBJECT}", uploads.put),
    ("POST", rf"/upload/(?P<what>join)/{OBJECT}", uploads.join),
    ("GET", f"/storage/{OBJECT}", reading.storage),
    ("GET", rf"{PAGE}/resolve/{REV}/(?P<path>.+)", reading.resolve),
]
_COMPILED = [(method, re.compile(pattern), answer) for method, pattern, answer in ROUTES]


def find(method: str, raw_path: str) -> tuple[ANSWER, dict[str, str]] | None:
    """The function for a request and the words of its path, unquoted; none where no route fits."""
    method = "GET" if method == "HEAD" else method
    for known, pattern, answer in _COMPILED:
        if method == known and (found := pattern.fullmatch(raw_path)):
            return answer, {name: unquote(word or "") for name, word in found.groupdict().items()}
    return None

"""The endpoints of large files: the LFS batch, uploads to signed addresses in one piece or in parts, the check."""

import json
from math import ceil
from typing import Any

from starlette.responses import JSONResponse, Response

from hub.accounts import require_writing
from hub.call import Call
from hub.commits import check_fields
from hub.lfs import LargeFiles, write_stream
from hub.refusal import Refusal, bad_request


def batch(call: Call) -> Response:
    """For each object where to upload it; nothing for those that are there."""
    repository, _, _ = call.writable(pull_request=True)
    fields = call.json({"operation", "objects"}, {"transfers", "hash_algo", "ref"})
    if fields["operation"] != "upload" or fields.get("hash_algo", "sha256") != "sha256":
        call.state.problems.append(f"LFS {fields['operation']} by {fields.get('hash_algo')} is not built")
        raise Refusal(501, "This test Hub takes uploads by sha256 only.")
    objects = [check_fields(item, {"oid", "size"}, set(), "objects") for item in fields["objects"]]
    in_parts = "multipart" in fields.get("transfers", ["basic"])
    told = [_item(call, repository.large, item["oid"], item["size"], in_parts) for item in objects]
    transfer = "multipart" if any("chunk_size" in str(item) for item in told) else "basic"
    return JSONResponse({"transfer": transfer, "objects": told}, media_type="application/vnd.git-lfs+json")


def _item(call: Call, large: LargeFiles, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"oid": oid, "size": size}
    present = large.size(oid)
    if present == size:
        return told
    if present is not None or not isinstance(size, int) or size <= 0:
        return told | {"error": {"code": 422, "message": f"size {size} is not that of {oid}"}}
    chunk = call.state.chunk_size
    verify = {"href": f"{call.state.endpoint}/{call.prefix}.git/info/lfs/objects/verify"}
    if in_parts and size > chunk:
        urls = {f"{n:05d}": _address(call, "part", oid, size, n) for n in range(1, ceil(size / chunk) + 1)}
        upload = {"href": _address(call, "join", oid, size, 0), "header": {"chunk_size": str(chunk), **urls}}
    else:
        upload = {"href": _address(call, "put", oid, size, 0)}
    return told | {"authenticated": True, "actions": {"upload": upload, "verify": verify}}


def _address(call: Call, what: str, oid: str, size: int, part: int) -> str:
    signature = call.state.signature(what, call.kind, call.repo_id, oid, size, part)
    host = call.state.endpoint if what == "join" else call.state.storage
    path = f"upload/{what}/{call.kind}/{call.repo_id}/{oid}"
    return f"{host}/{path}?size={size}&part={part}&signature={signature}"


def _signed(call: Call) -> tuple[LargeFiles, str, int, int]:
    """What an address was signed for: the files, the object, its size, the part.

    Raises:
        Refusal: The signature is of something else, or a token came along.
    """
    if "authorization" in call.request.headers:
        call.state.problems.append("a token was sent to the storage's host")
        raise bad_request("Only one auth mechanism allowed")
    what, oid = call.words["what"], call.words["oid"]
    size, part = (int(call.query.get(name, ["0"])[0]) for name in ("size", "part"))
    if call.query.get("signature") != [call.state.signature(what, call.kind, call.repo_id, oid, size, part)]:
        raise Refusal(403, "The signature does not match.")
    repository = call.state.store.find(call.kind, call.repo_id)
    if repository is None:
        raise Refusal(404, "Repository not found", "RepoNotFound")
    return repository.large, oid, size, part


async def put(call: Call) -> Response:
    """The bytes of an object or of a part of it."""
    large, oid, size, part = _signed(call)
    if "content-length" not in call.request.headers:
        raise Refusal(411, "You must provide the Content-Length HTTP header.")
    aside = large.aside()
    sha256, md5 = await write_stream(call.request.stream(), aside)
    if part == 0:
        large.keep(aside, sha256, oid, size)
        return Response(headers={"ETag": f'"{md5}"'})
    chunk = call.state.chunk_size
    expected = min(chunk, size - chunk * (part - 1))
    if (found := aside.stat().st_size) != expected:
        aside.unlink()
        raise bad_request(f"Part {part} of {oid} has {found} bytes, expected {expected}.")
    large.part(oid, part).parent.mkdir(parents=True, exist_ok=True)
    aside.replace(large.part(oid, part))
    return Response(headers={"ETag": f'"{md5}"'})


def join(call: Call) -> Response:
    """All parts have come."""
    large, oid, size, _ = _signed(call)
    fields = check_fields(json.loads(call.body), {"oid", "parts"}, set(), "The body")
    parts = [check_fields(part, {"partNumber", "etag"}, set(), "parts") for part in fields["parts"]]
    count = ceil(size / call.state.chunk_size)
    if fields["oid"] != oid or [part["partNumber"] for part in parts] != list(range(1, count + 1)):
        raise bad_request(f"Expected the parts 1 to {count} of {oid}.")
    with call.state.lock:
        large.join(oid, size, [part["etag"] for part in parts])
    return JSONResponse({"success": True})


def verify(call: Call) -> Response:
    repository, _ = call.repository()
    require_writing(call.account, call.namespace, pull_request=True)
    fields = call.json({"oid", "size"}, set())
    if repository.large.size(fields["oid"]) != fields["size"]:
        raise Refusal(404, f"There is no object {fields['oid']} of {fields['size']} bytes.")
    return JSONResponse({"success": True})

"""Who calls: users and their organisations behind tokens, and what each may read, write or create."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hub.refusal import Refusal, no_repository

# of the form that real tokens have, so that a search for secrets finds them
WRITE_TOKEN = "hf_TesterWritesOnlyToTheTestHub0000001"
READ_TOKEN = "hf_TesterReadsOnlyFromTheTestHub000002"
STRANGER_TOKEN = "hf_StrangerWritesElsewhereOnHub0000003"


@dataclass(frozen=True)
class Account:
    """A token's owner: the user's name, the token's role (read or write), the role in each organisation."""

    name: str
    role: str = "write"
    orgs: Mapping[str, str] = field(default_factory=dict)

    def writes_to(self, namespace: str) -> bool:
        return namespace == self.name or self.orgs.get(namespace) in ("admin", "write")

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs

    def whoami(self) -> dict[str, object]:
        orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": role} for name, role in self.orgs.items()]
        token = {"displayName": "test", "role": self.role}
        return {
            "type": "user",
            "id": f"user-{self.name}",
            "name": self.name,
            "fullname": self.name.title(),
            "email": f"{self.name}@example.com",
            "emailVerified": True,
            "isPro": False,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }


ORGS = {"acme": "write", "lookers": "read"}
DEFAULT_TOKENS = {
    WRITE_TOKEN: Account("tester", "write", ORGS),
    READ_TOKEN: Account("tester", "read", ORGS),
    STRANGER_TOKEN: Account("stranger", "write"),
}


def caller(authorization: str | None, tokens: Mapping[str, Account]) -> Account | None:
    """The account behind a header; none without a header.

    Raises:
        Refusal: The token is unknown.
    """
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or token not in tokens:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return tokens[token]


def require_account(account: Account | None) -> Account:
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    return account


def require_reading(account: Account | None, namespace: str, private: bool) -> None:
    if private and (account is None or not account.belongs_to(namespace)):
        raise no_repository(anonymous=account is None)


def require_content(account: Account | None, namespace: str, gated: object) -> None:
    """A gated repository shows its name and its files' names, not what is in them."""
    if not gated or (account is not None and account.belongs_to(namespace)):
        return
    if account is None:
        raise Refusal(401, "Access to this repo is restricted. You must be authenticated to access it.", "GatedRepo")
    raise Refusal(403, "Access to this repo is restricted and you are not in the authorized list.", "GatedRepo")


def require_writing(account: Account | None, namespace: str, pull_request: bool = False) -> Account:
    """Who may commit: the namespace's writers; others, who can read it, by a pull request."""
    account = require_account(account)
    if account.role != "write":
        raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
    if not pull_request and not account.writes_to(namespace):
        raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request.")
    return account

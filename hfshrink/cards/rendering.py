"""Text of others in a card: one line, no markup, no HTML, no link; numbers that are none are shown as text."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeGuard

from hfshrink.terminal import table

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"
LONGEST = 300  # characters of a text from a record
MOST_ROWS = 50  # of one table
DEEPEST = 20  # levels of mappings and lists in a record
PATHS = re.compile(r"file://\S+|(?<![\w.:/&<])/(?:[\w.@+-]+/)+[\w.@+-]*|(?<!\w)(?:~|[A-Za-z]:)[\\/][^\s|\"'`]*")
HOMES = re.compile(r"^(?:/home|/Users|[A-Za-z]:[\\/]Users)[\\/][^\\/]+$")
"""A home folder itself: its last part is a person's name."""
SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
SECRET_NAMES = frozenset({"token", "hf_token", "hub_token", "use_auth_token", "api_key", "password", "secret"})
"""Settings that no card shows."""


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder; a name that it does not know is an error."""
    import jinja2

    text = resources.files("hfshrink.cards").joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["plain"] = plain
    return environment.from_string(text).render(**values)


def plain(value: Any, longest: int = LONGEST) -> str:
    r"""One line of a card that shows the value as it is: it can't become a heading, cell, tag, link, list or formula.

    Args:
        value: Anything; what can't be printed, such as control characters, becomes a space.
        longest: Characters after which it is cut.

    Example:
        >>> print(plain("a_b | <b>[x](http://y)"))
        a\_b &#124; &lt;b&gt;\[x\](http:&#47;&#47;y)
    """
    text = one_line(value, longest)
    text = re.sub(r"([\\`*_\[\]~$])", r"\\\1", html.escape(text, quote=False))
    text = text.replace("|", "&#124;").replace("://", ":&#47;&#47;")
    text = re.sub(r"(?i)\b(www)\.", r"\1&#46;", text)
    text = re.sub(r"^([-+=#])(?=[-+=#\s]|$)", r"\\\1", text)  # at a line's start: a list, a rule, a heading
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def one_line(value: Any, longest: int = LONGEST) -> str:
    r"""The value's text without line breaks, control characters, paths of a machine, tokens and bidirectional marks.

    Example:
        >>> one_line("read /home/me/rows.csv\nwith hf_abcdefghijklmnopqrstuv")
        'read rows.csv with hf_…'
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 4 * longest]).split())
    text = PATHS.sub(lambda found: without_folder(found[0].removeprefix("file://")), SECRETS.sub("hf_…", text))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def without_folder(value: Any) -> Any:
    """The last part of what looks like a path of a machine; everything else as it is."""
    if isinstance(value, str) and re.match(r"/|~[\\/]|\\\\|[A-Za-z]:[\\/]", value):
        path = re.sub(HOMES, "", value.rstrip("\\/"))
        return re.split(r"[\\/]", path)[-1]
    return value


def without_folders(value: Any) -> Any:
    """The same for all texts in mappings and lists."""
    if isinstance(value, Mapping):
        return {str(name): without_folders(item) for name, item in value.items() if str(name) not in SECRET_NAMES}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return without_folder(value)


def settings_text(settings: Any) -> str:
    """`name=value` of all that is given, without machine paths and secrets.

    Example:
        >>> settings_text({"losses": {"logits": {"temperature": 2.0}}, "teacher": None, "layers": [0, 2]})
        'losses=(logits=(temperature=2.0)), layers=[0, 2]'
    """
    known = without_folders(settings) if isinstance(settings, Mapping) else {}
    shown = {name: value for name, value in known.items() if value is not None}
    return ", ".join(f"{one_line(name)}={_shown(value)}" for name, value in shown.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({settings_text(value)})"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def literal(value: Any) -> str:
    """A Python string of ASCII characters: it ends neither its line nor the fence around the code."""
    return '"' + ascii(str(value)[:200])[1:-1].replace('"', '\\"').replace("`", "\\x60").replace("<", "\\x3c") + '"'


def safe_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose cells are all `plain`; without rows it is empty."""
    cells = [[plain(cell) for cell in row] for row in rows]
    return table([plain(cell) for cell in header], cells) if cells else ""


def as_json(data: Any, sort_keys: bool = False) -> Any:
    """A record as it reads from a file, with None for numbers that no machine counts to.

    So a card made in memory is the one made from the stored record, whose keys config.json sorts.

    Example:
        >>> as_json({"b": 10**400, "a": float("inf")})
        {'b': None, 'a': None}
    """
    text = json.dumps(data, sort_keys=sort_keys, default=str)
    return _cut(json.loads(text, parse_int=_counted, parse_constant=lambda _: None), DEEPEST)


def _counted(digits: str) -> int | None:
    return int(digits) if len(digits) < 20 else None


def _cut(value: Any, levels: int) -> Any:
    """Without what is nested deeper than any record is."""
    if isinstance(value, Mapping):
        return {name: _cut(item, levels - 1) for name, item in value.items()} if levels else None
    if isinstance(value, list):
        return [_cut(item, levels - 1) for item in value] if levels else None
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one to calculate with."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; empty where it is none."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def and_more(found: int, shown: int, what: str) -> str:
    """What stands below a list or table that was cut."""
    return f"\n\nand {found - shown:,} more {what}." if found > shown else ""


def number(value: Any, form: str = "") -> str:
    """A number in a format of Python's; None is "not measured", and what is no number is shown as it is.

    Example:
        >>> number(1234, ","), number(None), number({"value": 0.5, "low": 0.4, "high": 0.6}, ".2f")
        ('1,234', 'not measured', '0.50 [0.40, 0.60]')
    """
    if isinstance(value, Mapping) and "value" in value:
        low, high = value.get("low"), value.get("high")
        interval = "" if low is None or high is None else f" [{number(low, form)}, {number(high, form)}]"
        return number(value["value"], form) + interval
    if value is None:
        return NOT_MEASURED
    if not is_number(value):
        return str(value)
    if isinstance(value, int) and "f" not in form:
        return format(value, ",")
    return format(value, form or ".4g")

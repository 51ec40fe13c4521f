"""Addresses of files elsewhere: put together, shown without their secrets, and the tokens that their hosts want."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

TOKENS = "ICNN_ZOO_TOKENS"

# What stands before the host: a user with or without a password, which may hold a slash. A port is not a password, and
# an @ in the path (hf://datasets/owner/name@revision) does not end a login.
_LOGIN = re.compile(r"(?<=://)(?:[^\s/'\"]*@|[^\s/@:'\"]+:(?!\d+[/\s'\"])[^\s@'\"]*@)")
_VALUE = re.compile(r"(?<=[?&])([^\s=&'\"]+)=[^\s&'\"#]+")


def shown(text: object) -> str:
    """A text without the logins and the values after a question mark of the addresses in it."""
    return _VALUE.sub(r"\1=***", _LOGIN.sub("***@", str(text)))


def join(url: str, *parts: str) -> str:
    """The address of something below another; what follows a question mark, as in signed ones, stays last."""
    base, mark, query = url.partition("?") if is_http(url) else (url, "", "")
    return "/".join([base.rstrip("/"), *parts]) + mark + query


def split_last(url: str) -> tuple[str, str]:
    """The address above, and the name of what lies there: the reverse of :func:`join`."""
    base, mark, query = url.partition("?") if is_http(url) else (url, "", "")
    above, _, name = base.rpartition("/")
    return above + mark + query, name


def is_address(text: str) -> bool:
    """Whether a text is an address (s3://bucket/zoo) and not a path or a name."""
    return re.match(r"[a-zA-Z][\w+.-]*://.", text) is not None


def is_http(url: str) -> bool:
    """Whether an address is of a web server."""
    return url.lower().startswith(("http://", "https://"))


def is_plain_http(url: str) -> bool:
    """Whether whoever is on the way can read and change what comes from an address."""
    return url.lower().startswith("http://") and not _is_loopback(_host(url))


def token_for(url: str) -> str | None:
    """The token that ``ICNN_ZOO_TOKENS`` ("example.org=TOKEN,other.org=TOKEN") has for an address; None without one.

    Raises:
        ValueError: The variable is of another form, or the address is not encrypted.
    """
    for entry in filter(None, os.environ.get(TOKENS, "").split(",")):
        host, mark, token = entry.strip().partition("=")
        if not (host and mark and token):
            raise ValueError(f"{TOKENS} must be host=token, separated by commas; an entry has another form.")
        if host == _host(url):
            if is_plain_http(url):
                raise ValueError(
                    f"{TOKENS} has a token for {host}, and tokens are sent over https only; got {shown(url)}."
                )
            return token
    return None


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # whoever opens it says what is wrong
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

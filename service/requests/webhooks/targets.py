"""The URLs that clients may name as webhooks, checked when the request arrives; nothing is resolved here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address

import httpx

from service.errors import InvalidRequest
from service.setting_values import split_host

DEFAULT_PORTS = {"https": 443, "http": 80}
PLAIN_URL = re.compile(r"(?i:https?)://[!-\[\]-~]+")  # visible ASCII, no backslash: parsers disagree on these
AUTHORITY = re.compile(r"://([^/?#]*)")
NO_PORT = re.compile(r":(?!\d*$)[^:\]]*$")  # int(), which httpx calls, also reads +443 and 4_43


@dataclass(frozen=True)
class Host:
    """An allowed host. port: the only allowed one; None: the default port of the scheme."""

    name: str
    port: int | None

    def matches(self, url: httpx.URL) -> bool:
        expected = self.port or DEFAULT_PORTS[url.scheme]
        return host_of(url) == self.name and port_of(url) == expected


@dataclass(frozen=True)
class Rules:
    """Which URLs are accepted. http: whether http:// is, too."""

    hosts: Sequence[Host]
    http: bool = False

    def check(self, text: str) -> httpx.URL:
        """The URL. Raises InvalidRequest for the field `webhook`; messages never list the allowed hosts."""
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL:
            raise invalid("must be a URL") from None
        if not PLAIN_URL.fullmatch(text):
            schemes = "http:// or https://" if self.http else "https://"
            raise invalid(f"must be an {schemes} URL of visible ASCII characters")
        if url.scheme == "http" and not self.http:
            raise invalid("must begin with https://")
        authority = AUTHORITY.findall(text)[0]
        if "@" in authority:
            raise invalid("must not contain a user name or password")
        if NO_PORT.search(authority):
            raise invalid("must have a port of digits only")
        if "#" in text:
            raise invalid("must not have a fragment (#)")
        if not any(host.matches(url) for host in self.hosts):
            raise invalid("must name a host and port that the operator allows")
        return url


def invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"webhook {reason}", param="webhook")


def host_of(url: httpx.URL) -> str:
    """The host in lower case; IPv6 addresses in their shortest form."""
    try:
        return str(IPv6Address(url.host)) if ":" in url.host else url.host
    except ValueError:
        return url.host


def port_of(url: httpx.URL) -> int:
    return DEFAULT_PORTS[url.scheme] if url.port is None else url.port


def read_rules(hosts: Sequence[str], http: bool) -> Rules:
    """The rules of the settings webhook_hosts and webhook_http."""
    return Rules([Host(*split_host(host)) for host in hosts], http)

"""Which URLs are accepted as webhooks."""

from __future__ import annotations

import pytest

from service.errors import InvalidRequest
from service.requests.webhooks.targets import read_rules
from service.setting_values import read_hosts, read_networks

HOSTS = ("hooks.example.org", "hooks.example.org:8443", "10.0.0.1", "[fd00::1]:9000")
RULES = read_rules(HOSTS, http=False)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.org",
        "https://hooks.example.org/a/b?token=1",
        "https://HOOKS.Example.org:443/",
        "HTTPS://hooks.example.org:8443/x",
        "https://10.0.0.1/",
        "https://[fd00:0::1]:9000/x",
    ],
)
def test_urls_of_allowed_hosts_and_ports_are_accepted(url: str):
    assert RULES.check(url).scheme == "https"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://hooks.example.org/", "begin with https://"),
        ("ftp://hooks.example.org/", "https:// URL"),
        ("file:///etc/passwd", "https:// URL"),
        ("gopher://hooks.example.org/", "https:// URL"),
        ("//hooks.example.org/", "https:// URL"),
        ("hooks.example.org", "https:// URL"),
        ("", "https:// URL"),
        ("https://", "https:// URL"),
        ("https:///x", "host and port"),
        ("https://user@hooks.example.org/", "user name"),
        ("https://user:password@hooks.example.org/", "user name"),
        ("https://hooks.example.org@127.0.0.1/", "user name"),
        ("https://@hooks.example.org/", "user name"),
        ("https://hooks.example.org\\@127.0.0.1/", "visible ASCII"),
        ("https://127.0.0.1\\.hooks.example.org/", "visible ASCII"),
        ("https://hooks.example.org/a b", "visible ASCII"),
        ("https://hooks.example.org/\r\nHost: x", "URL"),
        ("https://hooks.ex\u00e4mple.org/", "visible ASCII"),
        ("https://hooks\u3002example.org/", "visible ASCII"),
        ("https://hooks.example.org/#part", "fragment"),
        ("https://hooks.example.org:22/", "host and port"),
        ("https://hooks.example.org:80/", "host and port"),
        ("https://hooks.example.org:0/", "host and port"),
        ("https://hooks.example.org:99999/", "host and port"),
        ("https://hooks.example.org:+8443/", "digits only"),
        ("https://hooks.example.org:8_443/", "digits only"),
        ("https://[fd00::1]:+9000/", "digits only"),
        ("https://example.org/", "host and port"),
        ("https://hooks.example.org.evil.test/", "host and port"),
        ("https://hooks.example.org./", "host and port"),
        ("https://hooks%2eexample.org/", "host and port"),
        ("https://evil.test/hooks.example.org", "host and port"),
        ("https://evil.test?hooks.example.org", "host and port"),
        ("https://127.0.0.1/", "host and port"),
        ("https://2130706433/", "host and port"),
        ("https://0x7f000001/", "host and port"),
        ("https://0177.0.0.1/", "must be a URL"),
        ("https://167772161/", "host and port"),  # 10.0.0.1
        ("https://012.0.0.1/", "must be a URL"),
        ("https://10.1/", "host and port"),
        ("https://[::ffff:10.0.0.1]/", "host and port"),
        ("https://[fd00::1]/", "host and port"),
        ("https://[::1/", "URL"),
    ],
)
def test_other_urls_are_refused_by_the_field_without_naming_the_hosts(url: str, reason: str):
    with pytest.raises(InvalidRequest, match=reason) as error:
        RULES.check(url)
    assert error.value.param == "webhook"
    assert error.value.message.startswith("webhook ")
    assert "example.org" not in error.value.message


def test_http_is_accepted_where_the_operator_allows_it():
    rules = read_rules(HOSTS, http=True)
    assert rules.check("http://hooks.example.org/").scheme == "http"
    with pytest.raises(InvalidRequest, match="host and port"):
        rules.check("http://hooks.example.org:443/")
    with pytest.raises(InvalidRequest, match="http:// or https:// URL"):
        rules.check("ftp://hooks.example.org/")


@pytest.mark.parametrize(
    "text",
    [
        "https://hooks.example.org",
        "hooks.example.org/x",
        "*.example.org",
        "hooks.example.org:0",
        "hooks.example.org:65536",
        "hooks.example.org.",
        "user@hooks.example.org",
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "256.0.0.1",
        "[::1",
        "[not an address]",
        "::1",
        "a b",
    ],
)
def test_other_texts_are_no_hosts_of_the_setting(text: str):
    with pytest.raises(ValueError):  # noqa: PT011 - the setting's parser adds the message
        read_hosts(text)


def test_networks_are_networks_or_addresses():
    assert read_networks("10.0.0.0/8, ::1") == ("10.0.0.0/8", "::1/128")
    with pytest.raises(ValueError, match="host bits"):
        read_networks("10.0.0.1/8")

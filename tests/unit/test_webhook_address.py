"""Where webhooks may go, and the settings that say so."""

import ipaddress

import pytest

from serve_app.errors import InvalidValue
from serve_app.settings import Settings
from serve_app.webhooks.address import check_url, is_public
from tests.receiver import SECRET

INSIDE = [
    "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1", "fec0::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
    "2002:7f00:1::", "2001:db8::1", "2001:0:7f00:1::",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_that_are_not_of_the_public_internet(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(InvalidValue, match="not on the public internet") as refused:
        check_url(f"https://{host}/hook", allow_private=False)
    assert refused.value.param == "webhook_url"
    assert check_url(f"http://{host}/hook", allow_private=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "localhost", "a.localhost."])
def test_other_spellings_of_this_machine(host: str) -> None:
    with pytest.raises(InvalidValue, match="not on the public internet"):
        check_url(f"https://{host}/", allow_private=False)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.com/", "must start with https://"),
        ("ftp://example.com/", "must start with https://"),
        ("file:///etc/passwd", "must start with https://"),
        ("example.com/hook", "must start with https://"),
        ("https://", "names no host"),
        ("https:///hook", "names no host"),
        ("https://exa mple.com/", "names no host"),
        ("https://a%2eb/", "names no host"),
        ("https://example.com:0/", "names no host and port"),
        ("https://example.com:70000/", "names no host and port"),
        ("https://me:secret@example.com/", "user name or password"),
        ("https://example.com/\n", "no URL"),
        ("https://[::1/", "no URL"),
        ("https://0177.0.0.1/", "no URL"),
        ("https://example.com/" + "x" * 2000, "2000 at most"),
    ],
)
def test_urls_that_can_never_work_are_refused(url: str, said: str) -> None:
    with pytest.raises(InvalidValue, match=said) as refused:
        check_url(url, allow_private=False)
    assert "secret" not in refused.value.message


def test_a_url_is_kept_in_its_normal_form() -> None:
    assert check_url("https://Hooks.Example.com:443/a?b=c", allow_private=False) == "https://hooks.example.com/a?b=c"
    assert check_url("https://münchen.example/", allow_private=False) == "https://xn--mnchen-3ya.example/"


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "hunter2", "whsec_c2hvcnQ=", "whsec_***", SECRET.removeprefix("whsec_")]
)
def test_a_weak_secret_stops_the_start_and_is_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="the secret of 'alice' must be") as refused:
        Settings(webhook_secrets={"alice": secret})
    assert not secret or secret == "whsec_" or secret not in str(refused.value)


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_SERVE_WEBHOOK_SECRETS", f'{{"alice": "{SECRET}"}}')
    assert Settings().webhook_secrets["alice"].get_secret_value() == SECRET

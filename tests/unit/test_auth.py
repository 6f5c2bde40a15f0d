"""API keys, and the address that must not be open to everybody."""

import pytest

from serve_app.api.auth import ANONYMOUS, owner_of, refuse_public_address
from serve_app.errors import Unauthorized
from serve_app.settings import Settings

OPEN = Settings(store_url="redis://unused")
KEYED = Settings(store_url="redis://unused", api_keys={"alice": "key-a", "bob": "schlüssel"})


def test_a_key_stands_for_its_owner() -> None:
    assert owner_of("key-a", KEYED) == "alice"
    assert owner_of("schlüssel".encode().decode("latin-1"), KEYED) == "bob"
    assert owner_of(None, OPEN) == owner_of("whatever", OPEN) == ANONYMOUS


@pytest.mark.parametrize("key", [None, "key-b", "key-", "key-aa", ""])
def test_other_keys_are_refused(key: str | None) -> None:
    with pytest.raises(Unauthorized):
        owner_of(key, KEYED)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_a_public_address_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(ValueError, match="api_keys"):
        refuse_public_address(host, OPEN)
    refuse_public_address(host, KEYED)
    refuse_public_address(host, OPEN.model_copy(update={"allow_anonymous": True}))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_a_loopback_address_is_fine(host: str) -> None:
    refuse_public_address(host, OPEN)

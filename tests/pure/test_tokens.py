"""Tokens say what was put into them and nothing else; keys change without anybody being thrown out."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilonova.companions.tokens import Guesses, Keys, Passwords, Token, audit_id, kept_secret, pack, unpack
from kilonova.kit.errors import Invalid, Unknown


class Hand:
    at = 1_800_000_000.0

    def now(self):
        return self.at

    def sleep(self, seconds):
        self.at += seconds


IDS = st.one_of(
    st.uuids().map(lambda u: u.hex),
    st.just("default"),
    st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=40),
)
TOKENS = st.builds(
    Token,
    user_id=IDS,
    methods=st.sampled_from([("password",), ("token",), ("password", "token"), ("token", "application_credential")]),
    issued_at=st.floats(0, 4e9),
    expires_at=st.floats(0, 4e9),
    audit_ids=st.lists(st.uuids().map(lambda u: audit_id(u.hex)), min_size=1, max_size=2).map(tuple),
    target=st.sampled_from([None, "project", "domain", "system"]),
    target_id=st.one_of(st.just(""), IDS),
    application_credential_id=st.one_of(st.just(""), st.uuids().map(lambda u: u.hex)),
)


@given(TOKENS)
def test_a_token_is_read_as_it_was_written(token):
    assert unpack(pack(token)) == token


@given(st.binary(max_size=200))
def test_what_we_have_not_written_is_refused_and_nothing_else(raw):
    try:
        unpack(raw)
    except Unknown:
        pass


def test_the_longest_token_fits_into_255_letters(tmp_path):
    hex = "f" * 32
    longest = Token(
        user_id=hex,
        methods=("password", "token", "application_credential"),
        issued_at=1_800_000_000.123,
        expires_at=1_800_003_600.123,
        audit_ids=(audit_id(hex), audit_id("0" * 32)),
        target="project",
        target_id=hex,
        application_credential_id=hex,
    )
    assert len(Keys(tmp_path, Hand()).encrypt(pack(longest), 1_800_000_000)) <= 255


def test_tokens_outlive_a_change_of_keys_but_not_many(tmp_path):
    keys = Keys(tmp_path / "keys", Hand(), most=3)
    text = keys.encrypt(b"me", 0)
    keys.rotate()
    assert keys.decrypt(text) == b"me"
    keys.rotate()
    with pytest.raises(Unknown):
        keys.decrypt(text)
    assert len(list((tmp_path / "keys").iterdir())) == 3


def test_another_process_reads_tokens_of_a_key_it_has_not_seen_written(tmp_path):
    clock = Hand()
    one, other = Keys(tmp_path, clock), Keys(tmp_path, clock)
    one.rotate()
    assert other.decrypt(one.encrypt(b"first", 0)) == b"first"  # its staged key
    one.rotate()
    clock.at += 2
    assert other.decrypt(one.encrypt(b"second", 0)) == b"second"  # looked into the directory again


def test_keys_and_secrets_are_their_owners_alone(tmp_path):
    Keys(tmp_path / "keys", Hand()).rotate()
    secret = kept_secret(tmp_path / "own", lambda: "s3cret")
    assert kept_secret(tmp_path / "own", lambda: "another") == secret == "s3cret"
    for f in [*(tmp_path / "keys").iterdir(), tmp_path / "own"]:
        assert stat.S_IMODE(f.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "x", "gAAAA", "é" * 50, "A" * 5000, "gAAAAABrAD3T" + "A" * 100])
def test_junk_is_no_token(tmp_path, text):
    with pytest.raises(Unknown):
        Keys(tmp_path, Hand()).decrypt(text)


def test_a_password_is_right_or_wrong_and_nobody_has_none():
    passwords = Passwords(cost=10)
    kept = passwords.hash("correct horse")
    assert passwords.right("correct horse", kept)
    assert not passwords.right("correct horsf", kept)
    assert not passwords.right("correct horse", None)
    assert not passwords.right("", "")
    assert "horse" not in kept
    assert kept != passwords.hash("correct horse")
    with pytest.raises(Invalid):
        passwords.hash("")


@pytest.mark.parametrize("kept", ["plain", "$scrypt$", "$scrypt$ln=99,r=8,p=1$AAAA$AAAA", "$md5$ln=1,r=1,p=1$AA$AA"])
def test_a_hash_that_is_none_lets_nobody_in(kept):
    assert not Passwords(cost=10).right("", kept)


def test_who_guesses_waits_and_who_knows_does_not():
    clock = Hand()
    guesses = Guesses(clock, most=3, pause_s=15)
    for _ in range(3):
        assert not guesses.locked("joe")
        guesses.wrong("joe")
    assert guesses.locked("joe")
    assert not guesses.locked("jane")
    clock.at += 16
    assert not guesses.locked("joe")
    guesses.wrong("joe")
    assert not guesses.locked("joe")
    guesses.right("joe")
    assert guesses.failed.keys() == set()


def test_a_million_names_do_not_fill_the_memory():
    guesses = Guesses(Hand(), remembered=100)
    for n in range(1000):
        guesses.wrong(str(n))
    assert len(guesses.failed) <= 100

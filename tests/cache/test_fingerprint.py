"""Every field of a fingerprint is compared, and a difference is named."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.cache.fingerprint import WORDS, Fingerprint

NAMES = [field.name for field in fields(Fingerprint)]
ONE = Fingerprint(
    model="smollm2",
    revision="0a1b",
    weights="fp32",
    kv="bf16",
    rope="r0",
    template="t0",
    tokenizer="k0",
    transformers="5",
)
fingerprints = st.builds(Fingerprint, **dict.fromkeys(NAMES, st.sampled_from(["a", "b"])))


def test_every_field_has_a_description() -> None:
    assert list(WORDS) == NAMES
    assert len(set(WORDS.values())) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_difference_in_any_field_is_named_with_both_sides(name: str) -> None:
    stored = ONE.as_dict() | {name: "other"}
    assert ONE.difference(stored) == f"{WORDS[name]} changed: other → {getattr(ONE, name)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_field_that_is_missing_is_a_difference(name: str) -> None:
    stored = {key: value for key, value in ONE.as_dict().items() if key != name}
    assert ONE.difference(stored) == f"{WORDS[name]} changed: ? → {getattr(ONE, name)}"


@given(fingerprints, fingerprints)
def test_difference_names_the_first_field_that_differs(a: Fingerprint, b: Fingerprint) -> None:
    different = [name for name in NAMES if getattr(a, name) != getattr(b, name)]
    assert (a.difference(b.as_dict()) == "") == (a == b) == (not different)
    if different:
        assert a.difference(b.as_dict()).startswith(f"{WORDS[different[0]]} changed: ")


@given(fingerprints)
def test_a_fingerprint_survives_a_header(fingerprint: Fingerprint) -> None:
    assert Fingerprint(**fingerprint.as_dict()) == fingerprint
    assert fingerprint.difference(fingerprint.as_dict()) == ""


def test_unknown_fields_of_later_versions_are_ignored() -> None:
    """The loader compares every name that either side has; words are for those of this version."""
    assert replace(ONE).difference(ONE.as_dict() | {"colour": "blue"}) == ""

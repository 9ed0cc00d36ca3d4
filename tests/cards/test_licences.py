"""Licences: what the Hub knows, what may be passed on, what a card says of it."""

import re

import pytest

from cards.records import full_report
from hfshrink.cards import dataset_card, is_permissive, model_card
from hfshrink.cards.licences import LICENSES, PERMISSIVE, check_license, known_license
from hfshrink.errors import SettingError


def section(card):
    return re.search(r"\n## Licence\n\n(.*?)\n## ", card.content, re.DOTALL)[1]


def test_each_list_holds_what_everybody_knows():
    assert {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0"} <= PERMISSIVE < LICENSES
    assert not PERMISSIVE & {"gpl-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "llama3", "gemma", "other", "unknown"}
    assert all(name == name.lower().strip() for name in LICENSES)


@pytest.mark.parametrize("name", [None, "", [], "unknown", "other", "cc-by-nc-4.0", ["mit", "gemma"]])
def test_missing_and_restricting_licences_are_not_permissive(name):
    assert not is_permissive(name)


@pytest.mark.parametrize("card", [model_card(full_report()), dataset_card(full_report().details["subset"])])
def test_a_missing_licence_is_told(card):
    assert section(card).startswith("**No licence is recorded.** Without one nobody may use this")
    assert card.data.license is None


def test_a_licence_that_restricts_is_told_with_its_name_and_text():
    base = {"license": "other", "license_name": "our-licence", "license_link": "https://e.org/l"}
    text = section(model_card(full_report(), base_card=base))
    assert text.startswith("**other is not among the permissive licences.** This model is derived work")
    assert "[org/base](https://huggingface.co/org/base)" in text
    assert "Its name: our-licence." in text
    assert "Its text: https:&#47;&#47;e.org/l" in text


def test_a_permissive_licence_is_named():
    assert section(model_card(full_report(), license="mit")).startswith(
        "This model is under mit. It derives from [org/base]"
    )


def test_unknown_names_of_a_base_become_other_with_a_name():
    data = model_card(full_report(), base_card={"license": "Free for all!"}).data
    assert (data.license, data.license_name) == ("other", "Free-for-all".lower())
    assert known_license(None) == {}
    assert known_license(["MIT", "GPL"]) == {"license": ["mit", "gpl"]}


def test_the_record_goes_before_the_bases_card_and_the_caller_before_both():
    report = full_report()
    report.details["license"] = "gemma"
    assert model_card(report, base_card={"license": "mit", "license_name": "x"}).data.license == "gemma"
    assert model_card(report, base_card={"license": "mit"}, license="isc").data.license == "isc"


def test_the_nearest_name_is_suggested():
    for wrong, near in (("apache2.0", "apache-2.0"), ("Cc By 4.0", "cc-by-4.0"), ("llama-3", "llama3")):
        with pytest.raises(SettingError, match=f"Did you mean '{near}'"):
            check_license(wrong)
    with pytest.raises(SettingError, match="is no identifier that the Hub knows. For any other licence give"):
        check_license("zzzzzzzzzz")
    with pytest.raises(SettingError, match="is no identifier"):
        dataset_card(full_report().details["subset"], license="Whatever you like")

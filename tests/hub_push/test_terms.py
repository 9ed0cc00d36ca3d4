import logging

import pytest

from hfshrink.errors import SettingError
from hfshrink.hub import push_to_hub
from hfshrink.hub.terms import check_terms, may_copy


@pytest.fixture
def small(tmp_path):
    import tiny
    from hub_push.conftest import with_record

    with_record(tiny.model("bert", num_labels=2), base="acme/base").save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def base_with(api, text, **settings):
    api.create_repo("acme/base", private=settings.pop("private", None))
    if text is not None:
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="acme/base")
    if settings:
        api.update_repo_settings("acme/base", **settings)


def readme(hub):
    return hub.git("tester/small", "show", "main:README.md")


def test_licence_and_language_are_inherited(hub, api, small, caplog):
    base_with(api, "---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    push_to_hub(small, "small")
    assert "license: mit" in readme(hub)
    assert "language: en" in readme(hub)
    assert not [record for record in caplog.records if record.name.startswith("hfshrink")]


def test_a_licence_that_is_not_permissive_is_asked_about(hub, api, small):
    link = "license_link: https://host/terms"
    base_with(api, f"---\nlicense: other\nlicense_name: big-corp\n{link}\n---\n")
    with pytest.raises(SettingError, match=r"'big-corp' \(https://host/terms\).*accept_license=True"):
        push_to_hub(small, "small")
    assert not api.repo_exists("tester/small")
    push_to_hub(small, "small", accept_license=True)
    assert "license_name: big-corp" in readme(hub)
    assert "not among the permissive licences" in readme(hub)


def test_a_base_without_licence_is_warned_of(hub, api, small, caplog):
    base_with(api, "---\nlanguage: en\n---\n")
    push_to_hub(small, "small")
    assert "its card states none" in caplog.text
    assert "No licence is recorded" in readme(hub)
    push_to_hub(small, "small", license="apache-2.0")
    assert "license: apache-2.0" in readme(hub)


@pytest.mark.parametrize("settings", [{"gated": "auto"}, {"private": True}])
def test_a_gated_or_private_base_does_not_fail_the_push(hub, api, small, caplog, settings):
    base_with(api, "---\nlicense: mit\n---\n", **settings)
    push_to_hub(small, "stranger/small", token=hub.stranger_token)
    assert "The card of acme/base can't be read" in caplog.text
    assert "license" not in hub.git("stranger/small", "show", "main:README.md").split("---")[1]


def test_a_base_with_a_broken_card_does_not_fail_the_push(hub, api, small, caplog):
    hub.fail("HEAD", "acme/base/resolve", status=500, times=99)
    push_to_hub(small, "small")
    assert "The card of acme/base can't be read" in caplog.text


def test_given_fields_spare_the_look_at_the_base(hub, small):
    push_to_hub(small, "small", base_card={"license": "mit", "language": "de"})
    assert "language: de" in readme(hub)
    assert not [path for _, path, _ in hub.requests if "acme/base" in path]


@pytest.mark.parametrize(
    ("theirs", "given", "accepted", "asks"),
    [
        ("mit", None, False, False),
        ("Apache-2.0", None, False, False),
        ("cc-by-nc-4.0", None, False, True),
        ("cc-by-nc-4.0", "mit", False, True),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", False, False),
        ("cc-by-nc-4.0", "mit", True, False),
        ("llama3.2", None, False, True),
        ("gpl-3.0", None, False, True),
        ("Something of ours", None, False, True),
        (["mit", "cc-by-nc-4.0"], None, False, True),
        (["mit", "apache-2.0"], None, False, False),
        (None, None, False, False),
        (None, "mit", False, False),
    ],
)
def test_who_is_asked(theirs, given, accepted, asks, caplog):
    caplog.set_level(logging.ERROR)
    if asks:
        with pytest.raises(SettingError, match="not a permissive licence"):
            check_terms({"license": theirs}, given, accepted, "org/base")
    else:
        check_terms({"license": theirs}, given, accepted, "org/base")


@pytest.mark.parametrize(
    ("theirs", "rows", "accepted", "copied"),
    [
        ("mit", None, False, True),
        ("cc-by-sa-4.0", None, False, True),
        ("cc-by-nc-4.0", None, False, False),
        ("cc-by-nd-4.0", None, False, False),
        ("cc-by-nc-4.0", None, True, True),
        ("cc-by-nc-4.0", True, False, "error"),
        (None, None, False, False),
        (None, True, False, True),
        ("mit", False, True, False),
        (["mit", "cc-by-nd-4.0"], None, False, False),
    ],
)
def test_which_rows_are_copied(theirs, rows, accepted, copied):
    if copied == "error":
        with pytest.raises(SettingError, match="does not let everybody pass copies on"):
            may_copy({"license": theirs}, rows, accepted)
    else:
        found, why = may_copy({"license": theirs}, rows, accepted)
        assert found is copied
        assert bool(why) is not copied

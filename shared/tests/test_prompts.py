"""Prompt templates: well-formed, filled literally, refused where a name has no place."""

import pytest

from shared_core.data.prompts import TEMPLATES, check_template, fill, get_templates
from shared_core.errors import InputError


@pytest.mark.smoke
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_has_one_place_for_the_name(name: str) -> None:
    for template in get_templates(name):
        check_template(template)
        assert "star" in fill(template, ["star"])[0]


def test_names_are_filled_in_literally_and_in_order() -> None:
    names = ["{}", "{0} %s", "Ärmelkanal", "a.b"]
    assert fill("the {}!", names) == [f"the {name}!" for name in names]
    assert fill("the {}!", []) == []


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("template", "names", "message"),
    [
        ("a photo", ["cat"], "exactly once"),
        ("{} and {}", ["cat"], "exactly once"),
        ("a {}.", ["cat", " "], "class name 1 is ' '"),
        ("a {}.", [3], "class name 0 is 3"),
        ("a {}.", "cat", "list of strings"),
    ],
)
def test_bad_input(template: str, names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fill(template, names)


def test_an_unknown_set_is_named_with_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"'imagenet22k'; accepted: clip, clip-7"):
        get_templates("imagenet22k")

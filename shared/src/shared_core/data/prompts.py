"""Prompt templates for CLIP-like models, as plain data: a sentence with ``{}`` for the class name.

`TEMPLATES` holds the usual sets by name: ``clip``, the single general prompt of Radford et al.
(ICML 2021); ``clip-7``, the seven that they found to do most of what their eighty for ImageNet do;
and one prompt per data set, as prompt-tuning papers since CoOp (Zhou et al., IJCV 2022) use them.
"""

from collections.abc import Sequence

from shared_core.errors import InputError

__all__ = ["TEMPLATES", "check_template", "fill", "get_templates"]

_GENERAL = ("a photo of a {}.",)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "clip": _GENERAL,
    "clip-7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "caltech101": _GENERAL,
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "fgvc-aircraft": ("a photo of a {}, a type of aircraft.",),
    "food101": ("a photo of {}, a type of food.",),
    "imagenet": _GENERAL,
    "imagenet-a": _GENERAL,
    "imagenet-r": _GENERAL,
    "imagenet-sketch": _GENERAL,
    "imagenet-v2": _GENERAL,
    "oxford-flowers": ("a photo of a {}, a type of flower.",),
    "oxford-pets": ("a photo of a {}, a type of pet.",),
    "stanford-cars": _GENERAL,
    "sun397": _GENERAL,
    "ucf101": ("a photo of a person doing {}.",),
}


def get_templates(name: str) -> tuple[str, ...]:
    """The templates of one set.

    Args:
        name: A key of `TEMPLATES`.

    Raises:
        InputError: If the name is not known.

    Examples:
        >>> get_templates("dtd")
        ('{} texture.',)
    """
    if name not in TEMPLATES:
        raise InputError(
            f"there are no templates called {name!r}; accepted: {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def check_template(template: str) -> None:
    """Refuse a template that does not hold ``{}`` exactly once.

    Raises:
        InputError: If it does not.

    Examples:
        >>> check_template("a photo of a {}.")
    """
    if not isinstance(template, str) or template.count("{}") != 1:
        raise InputError(
            f"the template {template!r} has to hold {{}} exactly once, where the class name goes, "
            "as in 'a photo of a {}.'"
        )


def fill(template: str, classnames: Sequence[str]) -> list[str]:
    """One prompt per class name. Braces in a name are ordinary characters.

    Args:
        template: A sentence with one ``{}``.
        classnames: Names of the classes.

    Raises:
        InputError: If the template does not hold ``{}`` exactly once, or a name is blank.

    Examples:
        >>> fill("a photo of a {}.", ["red star", "set {1, 2}"])
        ['a photo of a red star.', 'a photo of a set {1, 2}.']
    """
    check_template(template)
    if isinstance(classnames, str):
        raise InputError(f"class names have to be a list of strings, not the string {classnames!r}")
    for index, name in enumerate(classnames):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"class name {index} is {name!r}; every class needs a name")
    before, after = template.split("{}")
    return [f"{before}{name}{after}" for name in classnames]

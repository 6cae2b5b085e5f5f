"""Elements of libvirt's XML, made in one line each."""

from xml.etree import ElementTree

Element = ElementTree.Element


def element(tag: str, text: str | None = None, /, *children: Element, **attributes: str) -> Element:
    """Attributes that are "" are left out; a trailing underscore is for names that are Python's."""
    made = Element(tag, {k.rstrip("_"): v for k, v in attributes.items() if v})
    made.text = text
    made.extend(children)
    return made

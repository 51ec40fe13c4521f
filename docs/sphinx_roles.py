"""A griffe extension: Sphinx's roles in docstrings, such as :func:`icnn_zoo.convert`, become links of the reference."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`(?P<short>~?)(?P<name>[\w.]+)`")


class SphinxRoles(griffe.Extension):
    """Rewrites the roles of every docstring; a name that the reference does not have stays code without a link."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Is called with every object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role), obj.docstring.value)


def _link(obj: griffe.Object, role: re.Match[str]) -> str:
    name = role["name"]
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = name
    shown = name.rpartition(".")[2] if role["short"] else name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

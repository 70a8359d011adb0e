"""The laws by name."""

from lowprec.errors import lookup
from lowprec.scaling.law import Law
from lowprec.scaling.laws import base, efficiency, gaps, precision

_LAWS = {law.name: law for family in (base, precision, efficiency, gaps) for law in family.LAWS}


def names() -> tuple[str, ...]:
    """The named laws."""
    return tuple(_LAWS)


def get(name: str) -> Law:
    """The law of a name.

    Raises:
      UsageError: (a ValueError) if there is none; it names the nearest.
    """
    return lookup("law", _LAWS, name)

"""The shape and type checks that stand over the package while tests run."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# As a static checker reads it, an int may stand where a float is annotated: capacity_factor=2 is no mistake.
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install_checks():
    """Check every annotation of switchmoe's modules that are imported from now on."""
    # The hook wants the checker's name and looks it up through this module, imported as `tests.checks`.
    return install_import_hook("switchmoe", "tests.checks.typechecked")

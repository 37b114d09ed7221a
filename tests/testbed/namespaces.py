"""Whether this machine lets tests have networks of their own."""

from mdiq.testbed.networks import SPACE, Namespaces, NoNamespacesError


def why_no_namespaces() -> str:
    """Return why this machine lets us have no namespaces, or nothing if it does."""
    try:
        Namespaces({"probe": str(next(SPACE.hosts()))}).close()
    except NoNamespacesError as error:
        return str(error)
    return ""

"""The optional packages of exports and engines, imported when needed; errors name the extra that installs them."""

import importlib
import importlib.util
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a package.

    Raises:
        RuntimeError: if the package cannot be imported; the message says why, and which extra installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"{module} does not import ({error}); pip install 'noisepolicy[{extra}]'") from error


def missing(*modules: str, extra: str) -> str | None:
    """Return the reason why something that needs `modules` does not run, or None if all are installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; pip install 'noisepolicy[{extra}]'"
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

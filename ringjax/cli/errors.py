"""What a user did wrong, in one line."""

import contextlib
from collections.abc import Iterator

__all__ = ["CommandError", "user_errors"]


class CommandError(Exception):
    """Wrong input; the command prints the text after `ringjax: error:` and exits with 2."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Around a call into the library whose exceptions of these kinds speak to the user."""
    try:
        yield
    except kinds as error:
        raise CommandError(str(error) or type(error).__name__) from error

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}: make .venv with a newer one")

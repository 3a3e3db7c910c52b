"""``python -m quark``."""

from quark.cli.app import main

if __name__ == "__main__":
    main()

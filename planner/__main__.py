"""Entry point of `planner`, `tonnage` and `python -m planner`."""

import gc
import os


def main() -> None:
    """Start the command line, without the garbage collector: a short command leaves that to its exit."""
    gc.disable()
    # pydantic would read the metadata of every installed package to look for plugins
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from planner.cli import main as start

    start()


if __name__ == "__main__":
    main()

"""Entry point of `planner`, `tonnage` and `python -m planner`."""

import gc


def main() -> None:
    """Start the command line. The collector stays off: a command that lives a third of a second leaves it to the exit."""
    gc.disable()
    from planner.cli import main as start

    start()


if __name__ == "__main__":
    main()

"""Entry point of `planner`, `tonnage` and `python -m planner`."""

import gc


def main() -> None:
    """Start the command line, without the garbage collector: a short command leaves that to its exit."""
    gc.disable()
    from planner.cli import main as start

    start()


if __name__ == "__main__":
    main()

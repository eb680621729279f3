"""The program: ``quantport``, and ``python -m quantport``."""

import gc


def main() -> None:
    """Runs the command line."""
    gc.set_threshold(100_000)  # the default, 700, spends a third of the imports on looking for garbage
    from quantport.cli import main as run

    run()


if __name__ == "__main__":
    main()

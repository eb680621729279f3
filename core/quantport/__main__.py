"""``python -m quantport``: the command line."""

from quantport.cli import main

if __name__ == "__main__":
    main()

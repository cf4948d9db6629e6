"""`python -m ferromoe` is the command `ferromoe`."""

from .cli import main

if __name__ == "__main__":
    main()

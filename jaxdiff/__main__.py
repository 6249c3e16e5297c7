"""`python -m jaxdiff` runs the command line."""

from jaxdiff.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m ovexport`."""

from ovexport.cli import main

if __name__ == "__main__":
    main()

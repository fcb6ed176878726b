"""`python -m scoresolve.cli`."""

from scoresolve.cli import main

if __name__ == "__main__":
    main()

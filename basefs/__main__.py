"""`python -m basefs`: the same as the command `basefs`."""

from basefs.cli.app import main

if __name__ == "__main__":
    main()

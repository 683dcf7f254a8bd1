"""`python -m treepo` is the command line."""

from treepo.cli import main

if __name__ == "__main__":
    main()

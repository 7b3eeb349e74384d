"""`python -m npdrt` is the command `npdrt`."""

from npdrt.cli import main

if __name__ == "__main__":
    main()

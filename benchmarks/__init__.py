"""What is measured of the library, one room a question; README.md names the command of each. Run from the root."""

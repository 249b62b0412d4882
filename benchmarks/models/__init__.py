"""Any model, two lines, no argument."""

"""What is read from a network: a module in, the maps of its stages out. Nothing here knows a loss."""

"""Does it help: methods trained alike on images, and judged once."""

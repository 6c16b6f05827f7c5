"""The stages of a transport, a file each, and what they share."""

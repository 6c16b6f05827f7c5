"""What starts Stillroom on a machine; no part of the service itself."""

"""What may be asked: pydantic models, frozen and closed. No torch, no SQL."""

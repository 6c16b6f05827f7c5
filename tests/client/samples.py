"""A kind and a job as the server would show them."""

from typing import Any

JOB = "job_01j8z3k4m5n6p7q8r9s0t1v2wx"
FAILED, CANCELLED, UNKNOWN = (f"{JOB[:-1]}{last}" for last in "fcz")
ECHO = {
    "kind": "echo",
    "summary": "Write a text file.",
    "schema": {
        "type": "object",
        "required": ["text"],
        "properties": {
            "kind": {"const": "echo", "default": "echo", "type": "string"},
            "name": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "priority": {"type": "integer", "minimum": 0, "maximum": 100, "default": 50},
            "labels": {"type": "object"},
            "text": {"type": "string", "description": "What to say."},
            "times": {"type": "integer", "minimum": 1, "default": 1, "description": "Lines."},
            "loud": {"type": "boolean", "default": False},
            "mood": {"enum": ["calm", "cross"], "type": "string", "default": "calm"},
            "pitch": {"type": "number", "exclusiveMinimum": 0, "default": 1.0},
            "voice": {
                "default": {"name": "bass", "depth": 3},
                "discriminator": {"propertyName": "name", "mapping": {"bass": "#/$defs/Bass"}},
                "oneOf": [{"$ref": "#/$defs/Bass"}, {"$ref": "#/$defs/Alto"}],
            },
            "echoes": {"type": "array", "items": {"type": "integer"}, "default": []},
        },
        "$defs": {
            "Bass": {
                "type": "object",
                "properties": {
                    "name": {"const": "bass", "type": "string"},
                    "depth": {"type": "integer", "description": "Of the voice."},
                },
            },
            "Alto": {
                "type": "object",
                "properties": {"name": {"const": "alto", "type": "string"}},
            },
        },
    },
    "example": {"kind": "echo", "text": "hello"},
    "inputs": {},
    "outputs": {"text": "text"},
}


def job_view(**changes: Any) -> dict[str, Any]:
    return {
        "id": JOB,
        "kind": "echo",
        "name": None,
        "state": "succeeded",
        "priority": 50,
        "labels": {},
        "spec": {},
        "created_at": "2026-01-02T03:04:05Z",
        "started_at": None,
        "finished_at": None,
        "deadline_at": None,
        "retry_of": None,
        "submitted_by": "local",
        "progress": {
            "done": 3.0,
            "total": 3,
            "fraction": 1.0,
            "stage": None,
            "rate": None,
            "eta_s": None,
        },
        "queue_position": None,
        "waits_for": None,
        "predicted_start_at": None,
        "error": None,
        "attempts": 3,
        "device_seconds": 0.5,
        "cache_hits": 0,
        "inputs": {},
        "artifacts": {},
        **changes,
    }
